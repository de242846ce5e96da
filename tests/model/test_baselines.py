"""Baselines from flash-linear-attention: their sizes, their checkpoints, what they compute, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lazypipe.model.baselines import (
    BaselineError,
    BaselineModel,
    build_model,
    check_baseline,
)
from lazypipe.model.checkpoint import load_checkpoint, save_checkpoint
from lazypipe.model.config import ModelConfig, parameter_count
from lazypipe.model.mixers.registry import BASELINES, MECHANISMS
from lazypipe.model.transformer import Transformer, count_parameters
from tests.baselines_package import import_baselines_package

PROJECT = Path(__file__).parents[2]
SIZES = {  # of attention_variants: hidden, intermediate, layers, heads
    "70M": (512, 2048, 6, 8),
    "340M": (1024, 2816, 24, 16),
    "760M": (1536, 4096, 24, 16),
}


@pytest.fixture(autouse=True)
def _package(request: pytest.FixtureRequest) -> None:
    if "without_package" not in request.node.name:
        import_baselines_package()


def small(mixer: str, **fields: object) -> ModelConfig:
    return ModelConfig.model_validate({"mixer": mixer, "hidden_size": 64, "num_layers": 2, "num_heads": 4, **fields})


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mixer", BASELINES)
def test_a_baseline_has_the_size_of_the_standard_model(mixer: str, size: str, tie: bool) -> None:
    hidden, intermediate, layers, heads = SIZES[size]
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_layers": layers, "num_heads": heads}
    config = small(mixer, **shape, tie_embeddings=tie)
    with torch.device("meta"):
        model = build_model(config, 32_000)
        standard = Transformer(config.model_copy(update={"mixer": "standard"}), 32_000)
    total, non_embedding = count_parameters(model)
    expected, expected_blocks = count_parameters(standard)
    assert total - non_embedding == expected - expected_blocks
    # mamba2 has whole blocks of half the size: at worst it is off by half of one.
    bound = 0.6 / (2 * layers) if mixer == "mamba2" else 0.002
    assert abs(non_embedding / expected_blocks - 1) < bound
    assert parameter_count(config, 32_000) == expected
    settings = config.mechanism.load().matched_settings(config)
    assert (settings["hidden_size"], settings["norm_eps"]) == (hidden, config.norm_eps)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("mixer", BASELINES)
def test_a_checkpoint_comes_back_and_no_seed_is_shared(tmp_path: Path, mixer: str, tie: bool) -> None:
    before = torch.get_rng_state()
    model = build_model(small(mixer, tie_embeddings=tie), 19, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(model, BaselineModel)
    assert type(model.get_submodule("backbone")).__name__ == model.model_class
    again, other = (build_model(model.config, 19, seed=seed).state_dict() for seed in (3, 4))
    save_checkpoint(tmp_path, model, 0, None)
    loaded = load_checkpoint(tmp_path).model
    assert type(loaded) is type(model) and not loaded.training
    buffers = dict(model.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in loaded.named_buffers())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and torch.equal(again[name], value)
    assert not torch.equal(other["embedding.weight"], model.embedding.weight)
    assert any(not torch.equal(other[name], value) for name, value in again.items() if name.startswith("backbone"))
    standard = Transformer(ModelConfig.model_validate({**small("standard").model_dump(), "tie_embeddings": tie}), 19, 3)
    assert torch.equal(standard.embedding.weight, model.embedding.weight)
    assert model.attention_layers == [] and list(model.attention_rows(torch.zeros(1, 2).long(), 8)) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("mixer", BASELINES)
def test_without_cuda_it_says_what_to_do(mixer: str) -> None:
    model = build_model(small(mixer), 19)
    with pytest.raises(BaselineError, match=rf"mixer={mixer} computes with CUDA .*gpus_per_worker: 1"):
        model(torch.arange(5)[None])


def test_mamba2_cannot_keep_documents_apart_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazypipe.model.baselines.check_baseline", lambda *_: None)
    with pytest.raises(BaselineError, match="mamba2 cannot keep packed documents apart"):
        build_model(small("mamba2"), 19)(torch.arange(5)[None], cu_seqlens=torch.tensor([0, 2, 5]))


def test_borders_are_checked_and_reach_the_package_on_the_device_of_the_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The meta device stands in for a GPU, where training keeps the borders on the CPU."""
    monkeypatch.setattr("lazypipe.model.baselines.check_baseline", lambda *_: None)
    with torch.device("meta"):
        model, tokens = build_model(small("gla"), 19), torch.zeros(1, 5, dtype=torch.long)
    given: dict[str, Any] = {}

    class Stop(Exception):  # noqa: N818  (no error: it ends the call)
        pass

    def record(**arguments: Any) -> None:
        given.update(arguments)
        raise Stop

    monkeypatch.setattr(model.get_submodule("backbone"), "forward", record)
    with pytest.raises(ValueError, match="rise from 0 to 5"):
        model(tokens, cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32))
    assert given == {}
    with pytest.raises(Stop):
        model(tokens, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))
    assert given["cu_seqlens"].device == tokens.device and given["cu_seqlens"].dtype == torch.int64


def test_without_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MECHANISMS, "gla", replace(MECHANISMS["gla"], package="a_package_nobody_has"))
    for call in (lambda: build_model(small("gla"), 19), lambda: check_baseline(small("gla"), torch.device("cuda"))):
        with pytest.raises(BaselineError, match=r"mixer=gla .* pip install 'lazypipe\[baselines\]'"):
            call()
    check_baseline(small("standard"), torch.device("cpu"))


@pytest.mark.parametrize("field", [{"pattern": "even"}, {"num_kv_heads": 2}, {"qk_norm": True}])
def test_what_a_whole_model_cannot_have_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(field))}=.* mixer=retnet, which is a whole model"):
        small("retnet", **field)


def interpreted(what: str, argument: object, mixer: str) -> dict[str, Any]:
    """What tests/model/interpreted_baselines.py measures, in a process of its own: Triton reads its variable once."""
    command = [sys.executable, str(Path(__file__).with_name("interpreted_baselines.py")), what, str(argument), mixer]
    environment = os.environ | {"TRITON_INTERPRET": "1", "FLA_CACHE_RESULTS": "0", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check_measured(found: dict[str, Any]) -> None:
    losses = found["losses"]
    assert all(later < sooner for sooner, later in pairwise(losses)), losses
    assert found["without_gradient"] == []
    assert found["decoding_error"] < 1e-4
    assert found["packing_error"] < 1e-4
    assert found["past_changed"] < 1e-6 < 1e-3 < found["future_changed"]


def test_a_baseline_trains_decodes_to_the_same_logits_and_never_looks_ahead() -> None:
    check_measured(interpreted("model", 2, "forgetting_transformer"))


@pytest.mark.long
@pytest.mark.parametrize("mixer", BASELINES)
def test_every_baseline_trains_decodes_to_the_same_logits_and_never_looks_ahead(mixer: str) -> None:
    check_measured(interpreted("model", 4, mixer))


@pytest.mark.long
def test_the_stages_train_resume_evaluate_and_analyse_a_baseline(tmp_path: Path) -> None:
    found = interpreted("stages", tmp_path, "forgetting_transformer")
    assert (found["resumed_from"], found["resumed_equal"]) == (1, True)
    assert 4 < found["validation_loss"] < math.log(300) and 4 < found["evaluated_loss"] < math.log(300)
    assert (found["continuations"], found["attention_layers"]) == (2, [])
