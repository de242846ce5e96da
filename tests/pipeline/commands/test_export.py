"""`lazypipe export`: from the store of a real run, or from a folder, to a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.pipeline.cli import app
from lazypipe.stages.contract import UserError
from tests.pipeline.tiny import FinishedRun, current_manifest, write_experiment


def export(*arguments: str | Path) -> str:
    """What `lazypipe export` says; its refusal raised."""
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@torch.no_grad()
def test_a_stored_variant_becomes_a_folder_that_transformers_loads(finished_run: FinishedRun, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = export(finished_run.config, tmp_path / "lazy", "--variant", "lazy")
    assert f"to {tmp_path / 'lazy'}" in said
    manifest = current_manifest(finished_run.root, "pretrain", "lazy")
    generation = finished_run.root / "store" / "pretrain" / manifest["fingerprint"][:12] / manifest["generation"]
    card = (tmp_path / "lazy" / "README.md").read_text()
    assert f"| validation loss | {manifest['metrics']['validation_loss']:.4f} nats per token |" in card
    assert "| experiment | tiny |" in card and f"/{manifest['generation']} |" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lazy", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lazy", trust_remote_code=True)
    inputs = tokenizer(["the king and queen"], return_tensors="pt")
    ours = load_checkpoint(generation / "checkpoint").model
    torch.testing.assert_close(model(**inputs).logits, ours(inputs.input_ids), rtol=0, atol=1e-5)
    for folder in (generation, generation / "checkpoint"):
        export(folder, tmp_path / folder.name)
        assert json.loads((tmp_path / folder.name / "config.json").read_text())["layer_mixers"] == ["lazy", "lazy"]
        assert "| experiment | tiny |" in (tmp_path / folder.name / "README.md").read_text()


def test_what_is_not_stored_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    with pytest.raises(UserError, match="several variants; choose one with --variant: lazy, standard"):
        export(config, tmp_path / "out")
    with pytest.raises(UserError, match=r"no such variant.*did you mean 'lazy'"):
        export(config, tmp_path / "out", "--variant", "lasy")
    make = rf"is not stored below .*; train it first: lazypipe run {config} pretrain.lr=0.1 --only pretrain/lazy"
    with pytest.raises(UserError, match=make):
        export(config, tmp_path / "out", "pretrain.lr=0.1", "--variant", "lazy")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"is no model checkpoint: config.json is missing"):
        export(tmp_path / "folder", tmp_path / "out")
    with pytest.raises(UserError, match="is a checkpoint folder: --variant"):
        export(tmp_path / "folder", tmp_path / "out", "--variant", "lazy")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "output").exists()
