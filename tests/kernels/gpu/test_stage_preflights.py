"""Whatever computes with the Triton kernels compares them with the reference first, and refuses wrong ones.

On a CPU the kernels run in the interpreter, which no stage chooses: here `auto` is made to mean them.
"""

import itertools
import sys

import pytest
import torch
from typer.testing import CliRunner

import lazypipe.kernels.api
import lazypipe.kernels.gpu.launch
import lazypipe.kernels.gpu.preflight
import lazypipe.stages.model_checks
from lazypipe.kernels.gpu.preflight import inference_preflight
from lazypipe.kernels.gpu.toeplitz import bias_tiles
from lazypipe.model.checkpoint import save_checkpoint
from lazypipe.model.mixers.lazy import LazyAttention
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact, UserError
from lazypipe.stages.evaluate import stage as evaluate
from lazypipe.stages.evaluate.config import EvaluateConfig, ExtrapolationConfig
from lazypipe.stages.facts import PretrainFacts, TokenizeFacts
from lazypipe.stages.model_checks import check_inference_kernels
from lazypipe.stages.pretrain.checks import check_kernels
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.sparsity import stage as sparsity
from lazypipe.stages.sparsity.config import SparsityConfig
from tests.stages.pretrain.toy_training import toy_corpus
from tests.stages.tiny_experiment import context_in, model_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(corpus, result of a training that never was): two lazy layers of head_dim 96, whose tiles are 16 x 32."""
    directory = tmp_path_factory.mktemp("trained")
    corpus = toy_corpus(directory / "corpus")
    config = model_config("lazy", hidden_size=192, num_heads=2)
    model = Transformer(config, TokenizeFacts.read(corpus.manifest).vocab_size)
    tokenizer = corpus.path / "tokenizer" / "tokenizer.json"
    save_checkpoint(directory / "pretrain" / "checkpoint", model, eos_id=0, tokenizer_json=tokenizer)
    facts = PretrainFacts(
        parameters=0, non_embedding_parameters=0, seq_len=32, steps=0, steps_executed=0, resumed_from=0, tokens=0,
        threads=1, device="cpu", attempts=[], document_masking=False, nonfinite_steps=0, spikes_skipped=0, kernel=None,
        world_size=1, parallel="replicate", reduction=None, gpu=None, flops_per_token=None, peak_flops="unknown",
    ).to_json()  # fmt: skip
    return corpus, Artifact(directory / "pretrain", {"facts": facts, "metrics": {}, "config": {"seed": 0}})


@pytest.fixture(autouse=True)
def auto_means_triton(monkeypatch):
    def always(backend, *_):
        return backend in ("auto", "triton")

    monkeypatch.setattr(lazypipe.kernels.api, "uses_triton", always)
    monkeypatch.setattr(lazypipe.stages.model_checks, "uses_triton", always)
    monkeypatch.setattr(lazypipe.kernels.gpu.preflight, "LENGTH", 40)  # the interpreter is slow
    monkeypatch.setattr(lazypipe.kernels.gpu.preflight, "DOCUMENTS", [0, 1, 12])
    inference_preflight.cache_clear()
    yield
    inference_preflight.cache_clear()


@pytest.fixture
def transposed_bias(monkeypatch):
    """Bias tiles as the kernels read them before: their two dimensions in memory the other way round."""
    true = bias_tiles

    def wrong(*args, **options):
        tiles = true(*args, **options)
        return tiles.transpose(2, 3).contiguous().view(tiles.shape)

    monkeypatch.setattr(lazypipe.kernels.gpu.launch, "bias_tiles", wrong)


def evaluated(trained, directory):
    config = EvaluateConfig(
        extrapolation=ExtrapolationConfig(context_lengths=(16,)), prompts=("the king",), max_new_tokens=2, max_tokens=32
    )
    return evaluate.run(config, {"tokenize": trained[0], "pretrain": trained[1]}, context_in(directory))


def measured(trained, directory):
    config = SparsityConfig(windows=1, seq_len=16, heat_map_heads=0)
    return sparsity.run(config, {"tokenize": trained[0], "pretrain": trained[1]}, context_in(directory))


@pytest.mark.parametrize("stage", [evaluated, measured])
@pytest.mark.usefixtures("transposed_bias")
def test_a_stage_refuses_wrong_kernels(trained, tmp_path, stage):
    with pytest.raises(UserError, match=r"preflight: out of backend 'triton' is off by .*, bound 2e-04 .*head_dim 96"):
        stage(trained, tmp_path)
    assert not any((tmp_path / "output").iterdir()), "it refused before it computed"


@pytest.mark.usefixtures("transposed_bias")
def test_generate_refuses_wrong_kernels(trained, monkeypatch, capsys):
    from lazypipe.pipeline.cli import app, main

    command = ["generate", str(trained[1].path), "the king", "--max-new-tokens", "2"]
    found = CliRunner().invoke(app, command)
    assert isinstance(found.exception, UserError) and "preflight: out of backend 'triton'" in str(found.exception)
    monkeypatch.setattr(sys, "argv", ["lazypipe", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error: preflight: out of backend 'triton' is off by" in capsys.readouterr().err


@pytest.mark.usefixtures("transposed_bias")
def test_training_refuses_wrong_kernels(monkeypatch):
    true = lazypipe.kernels.gpu.preflight.preflight
    monkeypatch.setattr(lazypipe.kernels.gpu.preflight, "preflight", lambda *shape, device: true(*shape, device="cpu"))  # noqa: ARG005
    config = PretrainConfig(model=model_config("lazy", hidden_size=192, num_heads=2), seq_len=32)
    with pytest.raises(UserError, match=r"preflight: out of backend 'triton' is off by"):
        check_kernels(config.model, config.kernel, config.dtype, torch.device("cuda"))


def test_right_kernels_are_checked_once_and_recorded(trained, tmp_path, monkeypatch):
    """Stages of one process share the check, which `generate` repeats at its own dtype only where that differs."""
    asked = []
    true = lazypipe.kernels.gpu.preflight.preflight

    def counted(*shape, **options):
        asked.append(shape)
        return true(*shape, **options)

    monkeypatch.setattr(lazypipe.kernels.gpu.preflight, "preflight", counted)
    facts = evaluated(trained, tmp_path / "evaluate").facts
    assert set(facts.preflight_errors) == {"out", "decode"} and facts.preflight_bound == 2e-4
    assert max(facts.preflight_errors.values()) < 1e-5 and "'decode': (16, 32, 4, 3)" in facts.preflight
    assert measured(trained, tmp_path / "sparsity").facts.preflight == facts.preflight
    from lazypipe.pipeline.commands.models import load_trained

    model = load_trained(trained[1].path / "checkpoint").checkpoint.model
    assert asked == [(2, 2, 96, 16, torch.float32)]
    assert check_inference_kernels(model, torch.bfloat16).bound == 3e-2
    assert [shape[4] for shape in asked] == [torch.float32, torch.bfloat16]


@pytest.mark.usefixtures("transposed_bias")
def test_nothing_is_checked_where_no_kernel_runs(monkeypatch):
    constant = model_config("lazy", lazy_threshold="constant", tau_init=-0.1)
    models = [Transformer(config, 9) for config in (model_config("standard"), constant)]
    models.append(Transformer(model_config("lazy"), 9, kernel="blockwise"))
    assert all(check_inference_kernels(model, torch.float32) is None for model in models)
    monkeypatch.undo()  # on a CPU `auto` is blockwise
    model = Transformer(model_config("lazy"), 9)
    assert all(mixer.kernel == "auto" for mixer in model.modules() if isinstance(mixer, LazyAttention))
    assert check_inference_kernels(model, torch.float32) is None


def test_auto_means_triton_only_where_it_can_run():
    from lazypipe.kernels.api import _suits_triton

    cases = itertools.product((8, 16, 256, 272), (torch.float32, torch.float64))
    assert [_suits_triton(dim, dtype) for dim, dtype in cases] == [False, False, True, False, True, False, False, False]
