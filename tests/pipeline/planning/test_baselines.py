"""An experiment with a baseline: refused before any work where it cannot run, planned where it can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lazypipe.model.mixers.registry import BASELINES, MECHANISMS
from lazypipe.pipeline.experiment.schema import compose, models
from lazypipe.pipeline.planning.plan import Selection, decide
from lazypipe.pipeline.planning.preflight import check_baselines
from lazypipe.pipeline.store.store import Store
from lazypipe.stages.contract import UserError
from tests.pipeline.store.filled_store import SMALL, nodes_of
from tests.pipeline.tiny import lazypipe, write_experiment

GPUS = {"pretrain": {"gpus_per_worker": 1}, "evaluate": {"gpus": 1}}


def with_baseline(mixer: str, resources: dict[str, Any]) -> dict[str, Any]:
    return {**SMALL, "variants": {"standard": {}, "other": {"mixer": mixer}}, "resources": resources}


@pytest.mark.parametrize("mixer", BASELINES)
def test_a_baseline_without_gpus_is_refused_and_with_gpus_planned(mixer: str) -> None:
    for resources, key in [({}, "pretrain.gpus_per_worker"), ({"pretrain": GPUS["pretrain"]}, "evaluate.gpus")]:
        with pytest.raises(
            UserError, match=rf"variants.other.mixer={mixer} .* CUDA GPUs only, but resources.{key} is 0"
        ):
            compose(with_baseline(mixer, resources))
    assert models(compose(with_baseline(mixer, GPUS)))["other"].mixer == mixer


def test_a_missing_package_is_refused_for_what_would_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {"standard": {}, "other": {"mixer": "gla"}}
    plan = decide(nodes_of(variants=variants, resources=GPUS), Store(tmp_path), Selection())
    monkeypatch.setitem(MECHANISMS, "gla", replace(MECHANISMS["gla"], package="a_package_nobody_has"))
    with pytest.raises(UserError, match=r"pretrain/other: mixer=gla .* pip install 'lazypipe\[baselines\]'"):
        check_baselines(plan)
    plan = decide(nodes_of(variants=variants, resources=GPUS), Store(tmp_path), Selection(only=("pretrain/standard",)))
    check_baselines(plan)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_command_line_exits_2_before_any_work(tmp_path: Path, command: str) -> None:
    config = write_experiment(tmp_path)
    result = lazypipe(command, config, "variants.other={mixer: retnet}")
    assert result.returncode == 2
    assert "variants.other.mixer=retnet is a model of flash-linear-attention" in result.stderr
    assert "~variants.other" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "output" / "store").exists()
