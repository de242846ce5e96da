"""The stage contract: what reaches the disk, in which order, and what a crash leaves."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazypipe.pipeline.execution.execute import map_in_processes
from lazypipe.stages import contract
from lazypipe.stages.contract import Context, StageWarning, file_sha256, write_atomically
from lazypipe.stages.warning_lines import read_warnings, warning_text


def context_in(directory: Path, **fields: Any) -> Context:
    for name in ("output", "scratch"):
        (directory / name).mkdir(exist_ok=True)
    return Context(directory / "output", directory / "scratch", **fields)


# ---- metrics


def test_metrics_are_appended_and_non_finite_values_are_left_out(tmp_path: Path) -> None:
    import numpy as np

    context = context_in(tmp_path)
    metrics: dict[str, Any] = {"loss": 4.5, "lr": np.float32(0.5), "bad": math.nan, "far": math.inf, "low": -math.inf}
    context.log_metrics(0, metrics)
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


# ---- warnings


def warned(directory: Path) -> list[tuple[str, int | None, list[int]]]:
    return [(w["message"], w["step"], w["ranks"]) for w in read_warnings(directory / "scratch")]


def test_a_warning_is_a_line_of_its_rank_and_a_python_warning(tmp_path: Path) -> None:
    contexts = [context_in(tmp_path, rank=rank, world_size=3) for rank in range(3)]
    with pytest.warns(StageWarning, match="^step 5: skipped: loss nan$") as seen:
        contexts[1].warn("skipped: loss nan", step=5)
    assert Path(seen[0].filename) == Path(__file__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for context in contexts:
            context.warn("parallel=fsdp has no effect")
        contexts[2].warn("skipped: loss nan", step=6)
    names = sorted(path.name for path in (tmp_path / "scratch").iterdir())
    assert names == [f"warnings-{rank:05d}.jsonl" for rank in range(3)]
    assert warned(tmp_path) == [
        ("skipped: loss nan", 5, [1]),
        ("parallel=fsdp has no effect", None, [0, 1, 2]),
        ("skipped: loss nan", 6, [2]),
    ]
    texts = [warning_text(entry) for entry in read_warnings(tmp_path / "scratch")]
    assert texts[:2] == ["step 5: skipped: loss nan (rank 1)", "parallel=fsdp has no effect"]
    assert warning_text("of a manifest of before") == "of a manifest of before"


def test_a_repetition_after_a_crash_is_one_warning_and_a_torn_line_costs_no_other(tmp_path: Path) -> None:
    context_in(tmp_path).write_warning("a kept unit is damaged")
    with (tmp_path / "scratch" / "warnings-00000.jsonl").open("ab") as file:
        file.write(b'{"time": 1, "mess')  # killed here
    again = context_in(tmp_path)
    again.write_warning("a kept unit is damaged")
    again.write_warning("skipped: loss inf", 3)
    assert warned(tmp_path) == [("a kept unit is damaged", None, [0]), ("skipped: loss inf", 3, [0])]


def test_many_warnings_of_one_kind_are_a_few_lines(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    for step in range(1, 101):
        context.write_warning(f"skipped: loss {step / 7:g}, gradient norm {'nan' if step % 2 else 1e-9}", step)
    context.write_warning("another kind")
    steps = [step for _, step, _ in warned(tmp_path)]
    assert steps == [*range(1, 17), 32, 64, None]
    assert warned(tmp_path)[-2][0].endswith("(warning 64 of this kind)")


def test_a_warning_on_a_full_disk_is_printed_and_written_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_in(tmp_path)
    append = contract._append

    def full(path: Path, lines: bytes) -> None:  # noqa: ARG001
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(contract, "_append", full)
    context.write_warning("no checkpoint of step 2")
    assert capsys.readouterr().err == "warning: no checkpoint of step 2\n"
    context.progress(1, 2, "steps")
    monkeypatch.setattr(contract, "_append", append)
    context.progress(2, 2, "steps")
    assert warned(tmp_path) == [("no checkpoint of step 2", None, [0])] and not capsys.readouterr().err


def test_warnings_of_libraries_are_routed_and_the_stage_s_own_are_written_once(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with context.routed_warnings():
            warnings.warn("a library says", stacklevel=1)
            context.warn("the stage says", step=1)
            warnings.warn("numbers overflow", RuntimeWarning, stacklevel=1)
    assert warned(tmp_path) == [("a library says", None, [0]), ("the stage says", 1, [0])]
    assert [str(warning.message) for warning in others] == ["numbers overflow"]


def test_stages_warn_through_their_context() -> None:
    stages = Path(contract.__file__).parent
    python_warnings = [
        f"{path.relative_to(stages)}:{number}"
        for path in sorted(stages.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if "warnings.warn(" in line and path.name != "contract.py"
    ]
    assert not python_warnings, "take a Context, or its `warn` as an argument"


def warn_and_double(item: int) -> int:
    warnings.warn(f"file {item} is odd" if item % 2 else "a library says", stacklevel=1)
    return 2 * item


def test_warnings_of_map_s_processes_are_the_stage_s(tmp_path: Path) -> None:
    context = context_in(tmp_path, map_function=map_in_processes(2))
    assert list(context.map(warn_and_double, range(4))) == [0, 2, 4, 6]
    assert sorted(message for message, _, _ in warned(tmp_path)) == ["a library says", "file 1 is odd", "file 3 is odd"]


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
