"""Baselines in the stages on a machine without CUDA: refused before any compute, analysed as without attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from lazypipe.model.baselines import build_model
from lazypipe.model.checkpoint import save_checkpoint
from lazypipe.model.mixers.registry import BASELINES, MECHANISMS
from lazypipe.stages.contract import Artifact, UserError
from lazypipe.stages.evaluate import stage as evaluate
from lazypipe.stages.evaluate.config import EvaluateConfig, ExtrapolationConfig
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.checks import kernel_used
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.sparsity import stage as sparsity
from lazypipe.stages.sparsity.config import SparsityConfig
from tests.baselines_package import import_baselines_package
from tests.stages.made_facts import pretrain_facts
from tests.stages.pretrain.toy_training import context_in, tiny_run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def trained(corpus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """As if trained on a GPU."""
    import_baselines_package()
    directory, config = tmp_path_factory.mktemp("gla"), tiny_run("gla")
    model = build_model(config.model, TokenizeFacts.read(corpus.manifest).vocab_size)
    tokenizer = corpus.path / "tokenizer" / "tokenizer.json"
    save_checkpoint(directory / "checkpoint", model, TokenizeFacts.read(corpus.manifest).eos_id, tokenizer)
    return Artifact(
        directory, {"config": config.model_dump(mode="json"), "facts": pretrain_facts(seq_len=config.seq_len)}
    )


def test_neither_trained_nor_evaluated(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mixer=gla computes with CUDA .*resources\.evaluate\.gpus: 1"):
        pretrain.run(tiny_run("gla"), {"tokenize": corpus}, context_in(tmp_path / "pretrain"))
    inputs = {"tokenize": corpus, "pretrain": trained}
    context = context_in(tmp_path / "evaluate")
    with pytest.raises(UserError, match="mixer=gla computes with CUDA"):
        evaluate.run(EvaluateConfig(extrapolation=ExtrapolationConfig(context_lengths=(16,))), inputs, context)
    assert list(context.output_dir.iterdir()) == []


def test_analysed_as_a_model_without_attention_weights(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    inputs = {"tokenize": corpus, "pretrain": trained}
    outputs = sparsity.run(SparsityConfig(windows=2, seq_len=16), inputs, context_in(tmp_path))
    assert outputs.metrics == {} and outputs.facts.attention_layers == []


def test_without_the_package_every_stage_says_how_to_install_it(
    corpus: Artifact, trained: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MECHANISMS, "gla", replace(MECHANISMS["gla"], package="a_package_nobody_has"))
    inputs = {"tokenize": corpus, "pretrain": trained}
    with pytest.raises(UserError, match=r"pip install 'lazypipe\[baselines\]'"):
        evaluate.run(
            EvaluateConfig(extrapolation=ExtrapolationConfig(context_lengths=(16,))),
            inputs,
            context_in(tmp_path / "evaluate"),
        )
    with pytest.raises(UserError, match=r"pip install 'lazypipe\[baselines\]'"):
        sparsity.run(SparsityConfig(windows=2, seq_len=16), inputs, context_in(tmp_path / "sparsity"))


@pytest.mark.parametrize("mixer", BASELINES)
def test_documents_are_masked_by_those_that_can(mixer: str) -> None:
    fields = {"model": {"mixer": mixer}, "document_masking": True}
    if mixer != "mamba2":
        assert kernel_used(PretrainConfig.model_validate(fields).model, "auto") == "fla"
        return
    with pytest.raises(ValidationError, match="document_masking=true does not go with mixer=mamba2"):
        PretrainConfig.model_validate(fields)
