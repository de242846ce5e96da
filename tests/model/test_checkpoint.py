"""Saving and loading models, and what a checkpoint that does not fit is told."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lazypipe.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.transformer import Transformer
from tests.model.tiny_model import with_side_text


def tiny(mixer: str = "lazy", tie: bool = True) -> Transformer:
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_bias_length": 4, "tie_embeddings": tie}
    return with_side_text(Transformer(ModelConfig.model_validate({**shape, "mixer": mixer}), 11, seed=5))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_what_is_saved_comes_back(tmp_path: Path, mixer: str, tie: bool) -> None:
    model = tiny(mixer, tie)
    tokenizer = tmp_path / "any.json"
    tokenizer.write_text("{}")
    save_checkpoint(tmp_path / "deep" / "checkpoint", model, eos_id=7, tokenizer_json=tokenizer)
    loaded = load_checkpoint(tmp_path / "deep" / "checkpoint")
    assert (loaded.vocab_size, loaded.eos_id, loaded.model.config) == (11, 7, model.config)
    assert loaded.tokenizer_path.read_text() == "{}"
    assert not loaded.model.training
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert b.requires_grad
    tokens = torch.arange(11)[None]
    assert torch.equal(model(tokens), loaded.model(tokens))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, tiny(), 0, None)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_checkpoint(tmp_path)


def test_weights_of_another_shape_are_named_with_what_was_expected(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny(), 0, None)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "model": {**stored["model"], "max_bias_length": 6}}))
    with pytest.raises(CheckpointError, match=r"mixer\.bias is torch.float32 \[2, 4\]; .* \[2, 6\]"):
        load_checkpoint(tmp_path)
    path.write_text(json.dumps({**stored, "model": {**stored["model"], "mixer": "standard"}}))
    with pytest.raises(CheckpointError, match=r"mixer\.bias \[2, 4\] is unknown to a 'standard' model"):
        load_checkpoint(tmp_path)
    path.write_text(json.dumps({**stored, "model": {**stored["model"], "num_layers": 2}}))
    with pytest.raises(CheckpointError, match=r"lacks tensor layers\.1\."):
        load_checkpoint(tmp_path)
    path.write_text(json.dumps({"model": {"hidden_sise": 3}}))
    with pytest.raises(CheckpointError, match="not a model configuration"):
        load_checkpoint(tmp_path)


def test_weights_of_another_dtype_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tiny(), 0, None)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"embedding\.weight is torch.bfloat16"):
        load_checkpoint(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'opened')!r}, 'w')",))

    save_checkpoint(tmp_path, tiny(), 0, None)
    for content in (pickle.dumps(Bomb()), b"", (tmp_path / "model.safetensors").read_bytes()[:-1]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load_checkpoint(tmp_path)
    assert not (tmp_path / "opened").exists()
