"""The ablations of Lazy through the stages: training, resuming, what is logged and measured, what the report says."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.stages.contract import Artifact
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.checks import check_kernels, kernel_used
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.report.contents import Report
from lazypipe.stages.report.findings import findings
from lazypipe.stages.report.rows import VariantRow
from lazypipe.stages.sparsity import stage as sparsity
from lazypipe.stages.sparsity.config import SparsityConfig
from tests.model.mixers.test_lazy_ablations import ABLATIONS
from tests.stages.made_facts import pretrain_facts
from tests.stages.pretrain.test_mechanisms import learns_and_resumes
from tests.stages.pretrain.toy_training import context_in, metric_lines, tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

BRIEF = {"no_bias", "no_elastic", "one_tau", "constant"}


def config_of(name: str, pattern: object = "uniform") -> PretrainConfig:
    config = tiny_run("lazy", steps=16, checkpoint_every=6, validate_every=16)
    model = {**config.model.model_dump(), "pattern": pattern, **ABLATIONS[name]}
    return PretrainConfig.model_validate({**config.model_dump(), "model": model})


@pytest.mark.parametrize("pattern", ["uniform", pytest.param("even", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BRIEF else pytest.mark.long) for name in ABLATIONS]
)
def test_an_ablation_goes_through_the_stages(corpus: Artifact, tmp_path: Path, name: str, pattern: str) -> None:
    config = config_of(name, pattern)
    learns_and_resumes(config, corpus, tmp_path)
    output = tmp_path / "whole" / "output"
    mixer: Any = load_checkpoint(output / "checkpoint").model.layers[0].mixer
    layers = {0} if pattern == "even" else {0, 1}
    logged = metric_lines(context_in(tmp_path / "whole"))[-1]["metrics"]
    for quantity in ("tau", "sparsity"):
        names = {f"{quantity}/layer_{layer}" for layer in layers}
        assert {key for key in logged if key.startswith(quantity)} == (set() if mixer.tau is None else names)
    history = json.loads((output / "tables" / "history.json").read_text())[-1]
    assert ("tau_mean" in history) == (mixer.tau is not None)

    trained = Artifact(output, {"config": config.model_dump(mode="json"), "facts": pretrain_facts(), "metrics": {}})
    inputs = {"tokenize": corpus, "pretrain": trained}
    measured = SparsityConfig(windows=2, seq_len=32, heat_map_heads=0)
    metrics = sparsity.run(measured, inputs, context_in(tmp_path / "sparsity")).metrics
    figures = {path.stem for path in (tmp_path / "sparsity" / "output" / "figures").iterdir()}
    for part, figure, metric in (
        (mixer.tau, "tau_heat_map", "tau_moved"),
        (mixer.bias, "bias_curves", "bias_moved"),
    ):
        assert (figure in figures) == (metric in metrics) == (part is not None)
    if mixer.tau is None:
        assert metrics["sparsity"] == 0 and metrics["surviving_mass"] == pytest.approx(1, abs=1e-6)
    else:
        assert metrics["sparsity"] > 0.05 and metrics["tau_moved"] > 1e-4
    if pattern == "uniform":
        rows = json.loads((tmp_path / "sparsity" / "output" / "tables" / "heads.json").read_text())
        taus = [[row["tau"] for row in rows if row["layer"] == layer] for layer in (0, 1)]
        shared = mixer.tau is not None and len(mixer.tau) == 1
        assert all((len(set(tau)) == 1) == (shared or mixer.tau is None) for tau in taus)


def test_the_report_says_how_far_what_was_learned_has_moved() -> None:
    tau = {"tau_moved": 0.25, "tau_min": -1.0, "tau_max": -0.75}
    constant = {"tau_moved": 6.8e-5, "tau_min": -3.12e-4, "tau_max": -2.4e-4}
    told = {}
    for learned, values in (
        ("both", {**tau, "bias_moved": 0.5}), ("tau", tau), ("bias", {"bias_moved": 0.5}), ("constant", constant),
    ):  # fmt: skip
        rows = [{"variant": "v", "mixer": "lazy", "validation_loss": 4.0, "perplexity": 54.6, **values}]
        typed = [VariantRow.from_json(row) for row in rows]
        report = Report(title="t", reference="v", columns=[], rows=typed, unigram_entropy=None)
        told[learned] = next(one.sentence for one in findings(report) if one.topic == "Learned thresholds")
    assert told["both"].endswith(
        "moved by up to 0.250 (to between -1.000 and -0.750), the distance bias by up to 0.500."
    )
    assert told["tau"].endswith("τ moved by up to 0.250 (to between -1.000 and -0.750).")
    assert told["bias"].endswith("the distance bias moved by up to 0.500.")
    assert told["constant"].endswith("τ moved by up to 6.8e-05 (to between -0.00031 and -0.00024).")


def test_a_switch_that_the_mixer_does_not_have_is_warned_of(corpus: Artifact, tmp_path: Path) -> None:
    config = tiny_run("standard", steps=2, warmup_steps=1)
    for number, fields in enumerate(({}, {"lazy_rope": False, "lazy_tau_scope": "layer"})):
        model = {**config.model.model_dump(), **fields}
        run = PretrainConfig.model_validate({**config.model_dump(), "model": model})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pretrain.run(run, {"tokenize": corpus}, context_in(tmp_path / str(number)))
        said = [str(one.message) for one in caught if "ablations of" in str(one.message)]
        assert len(said) == len(fields) // 2
    assert said[0].startswith(
        "lazy_rope, lazy_tau_scope: ablations of mixer=lazy; they change nothing in mixer=standard"
    )


@pytest.mark.parametrize(("name", "kernel"), [("no_bias", "blockwise"), ("constant", "torch")])
def test_what_computes_it_is_said(name: str, kernel: str) -> None:
    model = config_of(name).model
    assert kernel_used(model, "blockwise") == kernel
    # A constant threshold runs no Triton kernel, so there is none to check before training.
    assert name != "constant" or check_kernels(model, "auto", "float32", torch.device("cuda")) is None
