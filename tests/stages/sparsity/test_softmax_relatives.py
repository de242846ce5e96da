"""The relatives of the softmax, named in an experiment file and measured by the sparsity stage."""

from pathlib import Path

import pytest

from lazypipe.pipeline.experiment.schema import load_experiment, models
from lazypipe.stages.contract import Artifact
from lazypipe.stages.sparsity import stage as sparsity
from lazypipe.stages.sparsity.config import SparsityConfig
from tests.stages.tiny_experiment import context_in, pretrained, tokenized, trained_looking

EXPERIMENT = """
name: relatives
model: {hidden_size: 32, num_layers: 2, num_heads: 4, max_seq_len: 64}
variants:
  softmax1: {mixer: softmax1}
  sink: {mixer: sink}
  sigmoid: {mixer: sigmoid, sigmoid_bias: -2.5, sigmoid_bias_learnable: true}
  entmax: {mixer: entmax}
  stick_breaking: {mixer: stick_breaking}
  whole_stick: {mixer: stick_breaking, stick_breaking_remainder: true}
  elliptical: {mixer: elliptical}
  alibi: {mixer: alibi, pattern: even}
  swa: {mixer: swa, swa_window: 8}
  streaming: {mixer: swa, swa_window: 8, swa_sink_tokens: 2}
pretrain: {seq_len: 64}
"""
VARIANTS = (
    *("softmax1", "sink", "sigmoid", "entmax", "stick_breaking", "whole_stick", "elliptical", "alibi", "swa"),
    "streaming",
)
LENGTH = 32
PAIRS = LENGTH * (LENGTH + 1) / 2
# Of query i's keys, i - 7 lie outside a window of 8; two of them are sink tokens.
OUTSIDE = sum(max(0, i - 7) for i in range(LENGTH))
OUTSIDE_AND_NO_SINK = sum(max(0, i - 9) for i in range(LENGTH))
EXACT_ZEROS = {"stick_breaking": LENGTH, "whole_stick": 0, "swa": OUTSIDE, "streaming": OUTSIDE_AND_NO_SINK}
MASS_BELOW_ONE = {"softmax1", "sink", "stick_breaking"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tokenized(tmp_path_factory.mktemp("tokenize"), 200)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sparsity_stage_measures_it(corpus: Artifact, tmp_path: Path, variant: str) -> None:
    file = tmp_path / "relatives.yaml"
    file.write_text(EXPERIMENT, encoding="utf-8")
    config = models(load_experiment(file))[variant]
    fields = config.model_dump(exclude={"mixer"})
    inputs = {
        "tokenize": corpus,
        "pretrain": pretrained(tmp_path / "pretrain", trained_looking(config.mixer, **fields)),
    }
    measured = SparsityConfig(windows=2, seq_len=LENGTH, query_block=8, heat_map_heads=0)
    outputs = sparsity.run(measured, inputs, context_in(tmp_path / "run"))
    assert outputs.facts.mixer == config.mixer
    metrics = outputs.metrics
    if variant == "entmax":
        assert 0.05 < metrics["sparsity"] < 0.95
    else:
        zeros = EXACT_ZEROS.get(variant, 0) / PAIRS
        assert metrics["untrained_sparsity"] == pytest.approx(zeros, abs=1e-12)
        # With large scores a product of sticks falls below 1e-45 now and then: a zero like any other.
        assert zeros - 1e-12 <= metrics["sparsity"] <= zeros + (0.01 if "stick" in variant else 1e-12)
    assert metrics["zero_mass_rows"] == pytest.approx(1 / LENGTH if variant == "stick_breaking" else 0, abs=1e-12)
    if variant in MASS_BELOW_ONE:
        assert 0.1 < metrics["surviving_mass"] < 1 - 1e-3
    elif variant == "sigmoid":
        assert metrics["surviving_mass"] > 1  # nothing holds it to 1
    else:
        assert metrics["surviving_mass"] == pytest.approx(1, abs=1e-5)
