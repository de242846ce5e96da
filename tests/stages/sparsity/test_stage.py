"""The sparsity stage on tiny models: exact numbers where known, the kernel's own statistics as second opinion."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact, Interrupted, Outputs, UserError
from lazypipe.stages.data.batches import read_window, validation_windows
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.sparsity import measure
from lazypipe.stages.sparsity import stage as sparsity
from lazypipe.stages.sparsity.config import SparsityConfig
from tests.model.tiny_model import sparsity_by_layer
from tests.stages.tiny_experiment import VOCAB_SIZE, context_in, model_config, pretrained, tokenized, trained_looking

# Drawing costs most of the time: only the two shared runs draw attention maps.
CONFIG = SparsityConfig(windows=4, seq_len=32, query_block=8, heat_map_heads=0)
WITH_MAPS = CONFIG.model_copy(update={"heat_map_heads": 2})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tokenized(tmp_path_factory.mktemp("tokenize"), 400)


@dataclass(frozen=True)
class Finished:
    model: Transformer
    outputs: Outputs
    directory: Path

    @property
    def figures(self) -> set[str]:
        return {path.stem for path in (self.directory / "output" / "figures").iterdir()}


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory, corpus: Artifact) -> Finished:
    directory, model = tmp_path_factory.mktemp("standard"), trained_looking("standard")
    return Finished(model, run(directory, corpus, model, WITH_MAPS), directory)


@pytest.fixture(scope="module")
def lazy(tmp_path_factory: pytest.TempPathFactory, corpus: Artifact) -> Finished:
    directory, model = tmp_path_factory.mktemp("lazy"), trained_looking("lazy")
    return Finished(model, run(directory, corpus, model, WITH_MAPS), directory)


def run(directory: Path, corpus: Artifact, model: Transformer, config: SparsityConfig = CONFIG) -> Outputs:
    inputs = {"tokenize": corpus, "pretrain": pretrained(directory / "pretrain", model)}
    return sparsity.run(config, inputs, context_in(directory))


def test_standard_attention_has_no_exact_zero_and_all_of_its_mass(standard: Finished) -> None:
    metrics, facts = standard.outputs.metrics, standard.outputs.facts
    assert metrics["sparsity"] == 0 and metrics["untrained_sparsity"] == 0 and metrics["zero_mass_rows"] == 0
    assert metrics["surviving_mass"] == pytest.approx(1, abs=1e-6)
    assert metrics["sink"] + metrics["rest_mass"] == pytest.approx(metrics["surviving_mass"], abs=1e-12)
    assert not any(name.startswith(("tau", "bias")) for name in metrics)
    assert facts.windows == 4 and facts.mixer == "standard"
    assert standard.figures == {"sparsity_by_layer", "sink_by_layer", "attention_layer_0", "attention_layer_1"}
    heads = json.loads((standard.directory / "output" / "tables" / "heads.json").read_text())
    assert [row["tau"] for row in heads] == [None] * 8


def test_lazy_sparsity_is_the_share_the_kernel_itself_cuts(lazy: Finished, corpus: Artifact) -> None:
    metrics = lazy.outputs.metrics
    shards = TokenShards(corpus.path / "validation")
    windows = np.stack([read_window(shards, 32, w)[:-1] for w in validation_windows(shards, 32, 4)])
    kernel = sparsity_by_layer(lazy.model, torch.from_numpy(windows))
    assert kernel is not None
    # One of the 4 x 4 x 528 pairs may flip at the threshold by another order of summation.
    assert metrics["sparsity/layer_0"] == pytest.approx(kernel[0], abs=2e-4)
    assert metrics["sparsity/layer_1"] == pytest.approx(kernel[1], abs=2e-4)
    assert metrics["sparsity"] == pytest.approx(np.mean([share for share in kernel if share is not None]), abs=2e-4)
    assert 0.5 < metrics["untrained_sparsity"] < 0.7  # random scores at tau = -1
    assert metrics["sparsity"] > metrics["untrained_sparsity"] + 0.05
    assert metrics["zero_mass_rows"] == pytest.approx(1 / 32)  # the first row of each window, exactly zero at tau = -1
    assert 0 < metrics["surviving_mass"] < 1
    assert {"tau_heat_map", "bias_curves", "attention_layer_0", "attention_layer_1"} <= lazy.figures


def test_movement_is_measured_against_the_models_own_start(tmp_path: Path, corpus: Artifact) -> None:
    model = Transformer(model_config("lazy"), VOCAB_SIZE, seed=0)
    with torch.no_grad():
        model.get_parameter("layers.1.mixer.tau")[2] = -0.25
        model.get_parameter("layers.0.mixer.bias")[3, 5] += 0.5
    metrics = run(tmp_path, corpus, model).metrics
    assert metrics["tau_moved"] == pytest.approx(0.75) and metrics["tau_max"] == pytest.approx(-0.25)
    assert metrics["tau_min"] == -1 and metrics["tau_mean"] == pytest.approx(-1 + 0.75 / 8)
    assert metrics["bias_moved"] == pytest.approx(0.5, abs=1e-6) and metrics["bias_max"] == pytest.approx(0.5, abs=5e-3)


def test_untrained_model_equals_its_own_baseline(tmp_path: Path, corpus: Artifact) -> None:
    metrics = run(tmp_path, corpus, Transformer(model_config("lazy"), VOCAB_SIZE, seed=0)).metrics
    assert metrics["sparsity"] == metrics["untrained_sparsity"]
    assert metrics["tau_moved"] == 0 and metrics["bias_moved"] == 0


def test_tables_hold_every_head_and_average_to_the_summary(lazy: Finished) -> None:
    metrics = lazy.outputs.metrics
    tables = lazy.directory / "output" / "tables"
    heads = pq.read_table(tables / "heads.parquet").to_pylist()
    assert heads == json.loads((tables / "heads.json").read_text())
    assert [(row["layer"], row["head"]) for row in heads] == [(i, j) for i in range(2) for j in range(4)]
    layers = json.loads((tables / "layers.json").read_text())
    for name in ("sparsity", "near_zero", "surviving_mass", "sink", "entropy", "row_entropy", "concentration"):
        assert np.mean([row[name] for row in heads]) == pytest.approx(metrics[name])
        assert np.mean([row[name] for row in layers]) == pytest.approx(metrics[name])
    assert layers[1]["sparsity"] == metrics["sparsity/layer_1"] and layers[0]["sink"] == metrics["sink/layer_0"]


def test_layers_without_attention_weights_have_nulls_and_no_part_in_the_means(tmp_path: Path, corpus: Artifact) -> None:
    hybrid = run(tmp_path / "hybrid", corpus, trained_looking("mlp", pattern=[2]), WITH_MAPS)
    assert (hybrid.facts.mixer, hybrid.facts.pattern, hybrid.facts.attention_layers) == ("mlp", [2], [1])
    assert hybrid.metrics["surviving_mass"] == pytest.approx(1, abs=1e-6)
    assert hybrid.metrics["sink"] == hybrid.metrics["sink/layer_1"] and "sink/layer_0" not in hybrid.metrics
    heads = pq.read_table(tmp_path / "hybrid" / "output" / "tables" / "heads.parquet").to_pylist()
    assert [row["sink"] is None for row in heads] == [True] * 4 + [False] * 4
    assert [row["untrained_sparsity"] for row in heads] == [None] * 4 + [0.0] * 4
    figures = {path.stem for path in (tmp_path / "hybrid" / "output" / "figures").iterdir()}
    assert figures == {"sparsity_by_layer", "sink_by_layer", "attention_layer_1"}

    nothing = run(tmp_path / "mlp", corpus, trained_looking("mlp"), WITH_MAPS)
    assert nothing.metrics == {} and nothing.facts.attention_layers == []
    layers = pq.read_table(tmp_path / "mlp" / "output" / "tables" / "layers.parquet").to_pylist()
    assert [row["layer"] for row in layers] == [0, 1]
    assert {value for row in layers for name, value in row.items() if name != "layer"} == {None}
    assert not (tmp_path / "mlp" / "output" / "figures").exists()


def test_thresholds_of_a_lazy_hybrid_are_those_of_its_lazy_layers(tmp_path: Path, corpus: Artifact) -> None:
    model = trained_looking("lazy", pattern="first")
    with torch.no_grad():
        model.get_parameter("layers.1.mixer.tau")[2] = -0.25
    outputs = run(tmp_path, corpus, model)
    assert outputs.metrics["tau_moved"] == pytest.approx(0.75) and outputs.metrics["tau_min"] == -1
    assert outputs.metrics["sparsity/layer_0"] == 0 and outputs.metrics["sparsity/layer_1"] > 0.3
    layers = json.loads((tmp_path / "output" / "tables" / "layers.json").read_text())
    assert [row["tau"] for row in layers] == [None, pytest.approx(-1 + 0.75 / 4)]
    assert {"tau_heat_map", "bias_curves"} <= {path.stem for path in (tmp_path / "output" / "figures").iterdir()}


def test_query_block_changes_nothing(tmp_path: Path, corpus: Artifact, lazy: Finished) -> None:
    whole_window = run(tmp_path, corpus, lazy.model, CONFIG.model_copy(update={"query_block": 64})).metrics
    assert whole_window == pytest.approx(lazy.outputs.metrics, abs=2e-4)


def test_fewer_windows_than_asked_are_used_with_a_warning(tmp_path: Path) -> None:
    corpus = tokenized(tmp_path / "tokenize", 3 * 32 + 1)
    with pytest.warns(UserWarning, match=r"holds 3 windows of seq_len=32, 4 were asked for"):
        outputs = run(tmp_path, corpus, trained_looking("standard"))
    assert outputs.facts.windows == 3 and outputs.facts.windows_asked == 4


def test_no_window_is_refused_with_the_numbers(tmp_path: Path) -> None:
    corpus = tokenized(tmp_path / "tokenize", 32)
    with pytest.raises(UserError, match=r"32 tokens.*seq_len=32 needs 33"):
        run(tmp_path, corpus, trained_looking("lazy"))


def test_windows_longer_than_the_model_was_meant_for_are_measured_with_a_warning(
    tmp_path: Path, corpus: Artifact
) -> None:
    with pytest.warns(UserWarning, match=r"seq_len=96 is above model.max_seq_len=64"):
        outputs = run(tmp_path, corpus, trained_looking("standard"), CONFIG.model_copy(update={"seq_len": 96}))
    assert outputs.facts.beyond_max_seq_len is True


def test_diverged_weights_are_refused_by_name(tmp_path: Path, corpus: Artifact) -> None:
    model = trained_looking("lazy")
    with torch.no_grad():
        model.get_parameter("layers.1.mixer.tau")[0] = torch.nan
    with pytest.raises(UserError, match=r"layers\.1\.mixer\.tau .*diverged"):
        run(tmp_path, corpus, model)


def test_stop_request_is_honoured(tmp_path: Path, corpus: Artifact) -> None:
    inputs = {"tokenize": corpus, "pretrain": pretrained(tmp_path / "pretrain", trained_looking("lazy"))}
    context = context_in(tmp_path)
    (context.scratch_dir / "stop").touch()
    with pytest.raises(Interrupted, match="0 of 8 windows"):
        sparsity.run(CONFIG, inputs, context)


def test_bfloat16_and_grouped_heads(tmp_path: Path, corpus: Artifact) -> None:
    model = trained_looking("standard", num_kv_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = run(tmp_path, corpus, model, CONFIG.model_copy(update={"dtype": "bfloat16"})).metrics
    assert metrics["sparsity"] == 0
    assert metrics["surviving_mass"] == pytest.approx(1, abs=1e-2)


def test_heads_of_the_heat_maps_are_spread_over_all() -> None:
    assert measure.chosen_heads(16, 4) == [0, 5, 10, 15]
    assert measure.chosen_heads(3, 4) == [0, 1, 2]
    assert measure.chosen_heads(8, 1) == [0]
    assert measure.chosen_heads(8, 0) == []


def test_maps_are_the_upper_left_corner_of_the_windows_attention() -> None:
    model = trained_looking("lazy")
    tokens = torch.arange(300)[None] * 7 % VOCAB_SIZE
    maps = measure.attention_maps(model, tokens, [1, 3], CONFIG)
    assert maps.shape == (2, 2, 256, 256)
    whole = torch.cat([rows for layer, _, rows in model.attention_rows(tokens, 64) if layer == 1], dim=2)
    np.testing.assert_allclose(maps[1], whole[0, [1, 3], :256, :256].numpy(), atol=1e-5)
