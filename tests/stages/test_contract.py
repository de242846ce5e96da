"""The stage contract: what reaches the disk, in which order, and what a crash leaves."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypipe.stages import contract
from lazypipe.stages.contract import Context, file_sha256, write_atomically


def context_in(directory: Path, **fields: Any) -> Context:
    for name in ("output", "scratch"):
        (directory / name).mkdir(exist_ok=True)
    return Context(directory / "output", directory / "scratch", **fields)


# ---- metrics


def test_metrics_are_appended_and_non_finite_values_are_left_out(tmp_path: Path) -> None:
    import numpy as np

    context = context_in(tmp_path)
    context.log_metrics(0, {"loss": 4.5, "lr": np.float32(0.5), "bad": math.nan, "far": math.inf, "low": -math.inf})
    context.log_metrics(1, {"loss": 4})
    lines = [json.loads(line) for line in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["metrics"]) for line in lines] == [(0, {"loss": 4.5, "lr": 0.5}), (1, {"loss": 4.0})]
    assert all(type(value) is float for line in lines for value in line["metrics"].values())


def test_only_rank_0_writes_metrics_and_progress(tmp_path: Path) -> None:
    context = context_in(tmp_path, rank=1, world_size=2)
    context.log_metrics(0, {"loss": 1.0})
    context.progress(1, 1, "steps")
    assert not list(tmp_path.rglob("*.json*"))


# ---- progress


def test_progress_is_written_now_and_then_and_always_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 10.4, 10.6, 10.7, 10.8])
    monkeypatch.setattr(contract, "time", SimpleNamespace(monotonic=lambda: next(clock), time=lambda: 1.0))
    context = context_in(tmp_path, progress_interval_s=0.5)
    seen = []
    for done in (1, 2, 3, 4, 5):
        context.progress(done, 5, "steps", loss=4.0)
        seen.append(json.loads((tmp_path / "scratch" / "progress.json").read_text())["done"])
    assert seen == [1, 1, 3, 3, 5]


def test_progress_holds_what_the_display_reads(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    context.progress(3, 10, "files", phase="encoding", eta_s=4.0)
    found = json.loads((tmp_path / "scratch" / "progress.json").read_text())
    assert found.pop("time") > 0
    assert found == {"done": 3, "total": 10, "unit": "files", "numbers": {"phase": "encoding", "eta_s": 4.0}}


def test_a_stop_is_requested_by_a_file(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    assert not context.stop_requested
    (tmp_path / "scratch" / "stop").touch()
    assert context.stop_requested


# ---- tables and maps


def test_a_table_is_saved_as_parquet_and_as_json(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = [{"layer": 0, "sparsity": 0.5}, {"layer": 1, "sparsity": 0.25}]
    path = context_in(tmp_path).log_table("sparsity", rows)
    assert path == tmp_path / "output" / "tables" / "sparsity.parquet"
    assert pq.read_table(path).to_pylist() == rows == json.loads(path.with_suffix(".json").read_text())


def test_the_default_map_keeps_the_order(tmp_path: Path) -> None:
    assert list(context_in(tmp_path).map(len, ["a", "bbb", "cc"])) == [1, 3, 2]


# ---- atomic files


@given(old=st.text(max_size=20), new=st.text(max_size=20))
def test_a_file_holds_the_old_or_the_new_text(old: str, new: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("atomic") / "file.json"
    write_atomically(path, old, durable=False)
    write_atomically(path, new, durable=False)
    assert path.read_bytes() == new.encode()
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_crash_in_the_middle_keeps_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    path = tmp_path / "current"
    write_atomically(path, "g0001")

    def crash(*_: Any) -> None:
        raise OSError("killed")

    monkeypatch.setattr(os, "fsync", crash) if durable else monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="killed"):
        write_atomically(path, "g0002", durable=durable)
    monkeypatch.undo()
    assert path.read_text() == "g0001"
    assert [p.name for p in tmp_path.iterdir()] == ["current"], "a failed write leaves nothing behind"
    write_atomically(path, "g0003", durable=durable)
    assert path.read_text() == "g0003"


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
