"""Hybrids without their mixers, against the surviving blocks applied by hand and a model made of them alone."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.checkpoint import load_checkpoint, save_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.rope import rope_tables
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact, UserError
from lazypipe.stages.evaluate import stage as evaluate
from lazypipe.stages.evaluate.ablation import ablated
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.pretrain import stage as pretrain
from tests.stages.pretrain.toy_training import context_in, tiny_run, toy_corpus

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_layers": 4, "num_heads": 2, "max_seq_len": 16, "max_bias_length": 8}
TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def hybrid(mixer: str, pattern: Any, **fields: Any) -> Transformer:
    config = ModelConfig.model_validate({**SHAPE, "mixer": mixer, "pattern": pattern, **fields})
    model = Transformer(config, vocab_size=50, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # as initialised, blocks hardly change the residual stream
    if mixer == "text_qk":
        assert model.side is not None
        model.side.set_tokens(torch.arange(16))
    return model.eval()


def by_hand(model: Transformer, tokens: Tensor, keep_mlp: bool) -> Tensor:
    """Logits from the standard layers' modules one after the other; of the others at most the MLP."""
    config = model.config
    x = model.embedding(tokens)
    rope = rope_tables(0, tokens.shape[1], config.head_dim, config.rope_theta, x.device)
    for block, mixer in zip(model.layers, config.layer_mixers, strict=True):
        if mixer == "standard":
            x = x + block.mixer(block.mixer_norm(x), BlockInputs(rope)).x
        if mixer == "standard" or keep_mlp:
            x = x + block.mlp(block.mlp_norm(x))
    matrix = model.embedding.weight if model.head is None else model.head.weight
    return F.linear(model.final_norm(x), matrix)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mixer", "pattern"),
    [("mlp", "even"), ("gating", "odd"), ("lazy", "first"), ("random_qk", [2, 3]), ("text_qk", "even"),
     ("static_qk", "last"), ("elliptical", "even")],
)  # fmt: skip
def test_what_is_left_computes_what_its_blocks_do(mixer: str, pattern: Any) -> None:
    model = hybrid(mixer, pattern, tie_embeddings=mixer != "lazy")
    whole = model(TOKENS)
    with ablated(model, "skip"):
        skipped = model(TOKENS)
    with ablated(model, "skip_mixer"):
        without_mixer = model(TOKENS)
    torch.testing.assert_close(skipped, by_hand(model, TOKENS, keep_mlp=False))
    torch.testing.assert_close(without_mixer, by_hand(model, TOKENS, keep_mlp=True))
    assert not torch.allclose(skipped, without_mixer, atol=1e-2) and not torch.allclose(skipped, whole, atol=1e-2)
    assert torch.equal(model(TOKENS), whole)  # whole again


@torch.no_grad()
def test_skip_is_a_standard_model_of_the_blocks_that_are_left(tmp_path: Path) -> None:
    """Written to disk under the names of a two-layer standard model and loaded as one."""
    model = hybrid("random_qk", [1, 3])
    small = Transformer(ModelConfig.model_validate({**SHAPE, "num_layers": 2}), vocab_size=50)
    weights = model.state_dict()
    renamed = {
        name.replace("layers.1.", "layers.2.", 1): name for name in small.state_dict() if name.startswith("layers.1.")
    }
    source = {target: name for name, target in renamed.items()}
    small.load_state_dict({name: weights[source.get(name, name)] for name in small.state_dict()})
    save_checkpoint(tmp_path, small, eos_id=0, tokenizer_json=None)
    with ablated(model, "skip"):
        torch.testing.assert_close(model(TOKENS), load_checkpoint(tmp_path).model(TOKENS))


def test_an_error_inside_leaves_the_model_whole() -> None:
    model = hybrid("mlp", "even")
    modules = list(model.modules())
    for ablation in ("skip", "skip_mixer"):
        with pytest.raises(RuntimeError, match="stop"), ablated(model, ablation):
            raise RuntimeError("stop")
        assert list(model.modules()) == modules


@pytest.mark.parametrize(("mixer", "pattern"), [("lazy", "uniform"), ("standard", "even")])
def test_a_uniform_model_is_refused(mixer: str, pattern: str) -> None:
    model = hybrid(mixer, pattern)
    with pytest.raises(UserError, match=f"every layer of this model is {mixer}"), ablated(model, "skip"):
        pass


def test_evaluation_scores_the_same_windows_without_the_mixers(tmp_path: Path) -> None:
    corpus = toy_corpus(tmp_path / "corpus")
    config = tiny_run("mlp", steps=30)
    config = config.model_copy(update={"model": config.model.model_copy(update={"pattern": (2,)})})
    outputs = pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path / "trained"))
    trained = Artifact(tmp_path / "trained" / "output", {"facts": outputs.facts.to_json(), "metrics": outputs.metrics})
    fields = {"extrapolation": {"context_lengths": [16]}, "max_tokens": 1000, "prompts": ["the"], "max_new_tokens": 2}

    def evaluated(name: str, **more: Any) -> dict[str, float]:
        config = EvaluateConfig.model_validate({**fields, **more})
        return evaluate.run(config, {"tokenize": corpus, "pretrain": trained}, context_in(tmp_path / name)).metrics

    plain, reduced = evaluated("plain"), evaluated("reduced", ablations=["skip", "skip_mixer"])
    assert {name: reduced[name] for name in plain} == plain
    assert not (tmp_path / "plain" / "output" / "tables" / "ablations.parquet").exists()
    table = pq.read_table(tmp_path / "reduced" / "output" / "tables" / "ablations.parquet").to_pylist()
    assert [row["ablation"] for row in table] == ["skip", "skip_mixer"]
    for row in table:
        name = row["ablation"]
        assert row["loss"] == reduced[f"validation_loss/{name}"] > plain["validation_loss"]
        assert row["perplexity"] == reduced[f"perplexity/{name}"]
        assert (row["context_length"], row["tokens"]) == (32, 31 * 32)
