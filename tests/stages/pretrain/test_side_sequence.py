"""The stages of a model with a side sequence: where its text comes from, and that no stage goes beyond it."""

import json
from pathlib import Path

import pytest

from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.stages.contract import Artifact, UserError
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate import stage as evaluate
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.sparsity import stage as sparsity
from lazypipe.stages.sparsity.config import SparsityConfig
from tests.stages.pretrain.toy_training import context_in, tiny_run


@pytest.fixture(scope="module")
def trained(corpus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A text_qk model of max_seq_len 64 after six steps."""
    directory = tmp_path_factory.mktemp("text_qk")
    config = tiny_run("text_qk", steps=6)
    outputs = pretrain.run(config, {"tokenize": corpus}, context_in(directory))
    manifest = {"config": config.model_dump(mode="json"), "facts": outputs.facts.to_json(), "metrics": outputs.metrics}
    return Artifact(directory / "output", manifest)


def test_the_text_is_the_beginning_of_the_training_corpus(corpus: Artifact, trained: Artifact) -> None:
    side = load_checkpoint(trained.path / "checkpoint").model.side
    assert side is not None and side.tokens is not None
    assert side.tokens.tolist() == TokenShards(corpus.path / "train").read(0, 64).tolist()
    assert json.loads((trained.path / "checkpoint" / "config.json").read_text())["model"]["mixer"] == "text_qk"


def test_a_corpus_shorter_than_the_text_is_refused_before_compute(corpus: Artifact, tmp_path: Path) -> None:
    config = tiny_run("text_qk")
    model = config.model.model_dump() | {"max_seq_len": 10**6}
    config = PretrainConfig.model_validate(config.model_dump() | {"model": model})
    with pytest.raises(
        UserError, match=r"first max_seq_len=1000000 tokens of the training corpus, which has \d+; lower"
    ):
        pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path))


def test_evaluation_stays_within_the_text(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    inputs = {"tokenize": corpus, "pretrain": trained}
    fields = {"prompts": ["the king"], "max_new_tokens": 200, "max_tokens": 500}
    config = EvaluateConfig.model_validate({**fields, "extrapolation": {"context_lengths": [32, 64]}})
    outputs = evaluate.run(config, inputs, context_in(tmp_path))
    assert outputs.metrics["perplexity_at/64"] > 1
    rows = json.loads((tmp_path / "output" / "tables" / "continuations.json").read_text())
    assert len(rows) == 2 and all(rows[n]["text"] for n in (0, 1))
    config = EvaluateConfig.model_validate({**fields, "extrapolation": {"context_lengths": [32, 65]}})
    with pytest.raises(UserError, match="context_lengths: 65 tokens are more than max_seq_len=64"):
        evaluate.run(config, inputs, context_in(tmp_path))


def test_the_untrained_model_has_the_same_text(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    inputs = {"tokenize": corpus, "pretrain": trained}
    config = SparsityConfig(windows=2, seq_len=64, heat_map_heads=0)
    outputs = sparsity.run(config, inputs, context_in(tmp_path))
    assert outputs.metrics["surviving_mass"] == pytest.approx(1, abs=1e-6)
    rows = json.loads((tmp_path / "output" / "tables" / "heads.json").read_text())
    assert all(0 < row["untrained_sink"] < 1 and row["untrained_sink"] != row["sink"] for row in rows)
    with pytest.raises(UserError, match=r"sparsity\.seq_len: 65 tokens are more than max_seq_len=64"):
        sparsity.run(config.model_copy(update={"seq_len": 65}), inputs, context_in(tmp_path))
