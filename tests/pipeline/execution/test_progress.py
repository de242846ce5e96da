"""What is shown while stages run, with whatever a progress file may hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from lazypipe.pipeline.execution import progress
from lazypipe.pipeline.execution.progress import Display

GOOD: dict[str, Any] = {"done": 50, "total": 200, "unit": "steps", "time": 1000.0, "numbers": {"loss": 4.3125}}


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes any time, however busy the machine."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 100.0))


def plain_display(*node_ids: str) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, width=60), list(node_ids)), out


def live_display(*node_ids: str) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, width=140, force_terminal=True, legacy_windows=False), list(node_ids)), out


def rendered(display: Display) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(display._table())
    return out.getvalue()


def shown(tmp_path: Path, text: str) -> str:
    """The table's line of one running node after a progress file held `text`."""
    display, _ = live_display("pretrain/lazy")
    file = tmp_path / "progress.json"
    file.write_text(text, encoding="utf-8")
    display.begin("pretrain/lazy", file)
    display.refresh()
    return rendered(display)


# ---- plain lines


def test_plain_output_is_a_line_per_event_however_narrow_the_output(tmp_path: Path) -> None:
    display, out = plain_display("tokenize", "pretrain/lazy", "report")
    display.start()
    display.begin("tokenize", tmp_path / "progress.json")
    display.set("tokenize", "done", "train_tokens=1,000 " + "x" * 80)
    display.set("pretrain/lazy", "failed", "expected [a, b] in [/tmp/x]")
    display.set("report", "blocked", "needs pretrain/lazy")
    display.note("warning: [bold] is no markup here")
    display.stop()
    lines = out.getvalue().splitlines()
    assert lines[0] == "tokenize: started"
    assert lines[1].startswith("tokenize: done in 0s: train_tokens=1,000 ") and lines[1].endswith("x" * 80)
    assert lines[2:] == [
        "pretrain/lazy: failed: expected [a, b] in [/tmp/x]",
        "report: blocked: needs pretrain/lazy",
        "warning: [bold] is no markup here",
    ]


def test_plain_progress_comes_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    display, out = plain_display("pretrain/lazy")
    file = tmp_path / "progress.json"
    display.begin("pretrain/lazy", file)
    file.write_text(json.dumps(GOOD))
    display.refresh()
    assert "50/200" not in out.getvalue(), "too early for a line"
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    file.write_text(json.dumps(GOOD | {"done": 100, "time": 1010.0}))
    display.refresh()
    assert out.getvalue().splitlines()[-1] == "pretrain/lazy: 100/200 steps  loss=4.31  0s  ETA 20s"


def test_a_node_that_begins_again_starts_afresh(tmp_path: Path) -> None:
    display, out = plain_display("pretrain/lazy")
    file = tmp_path / "progress.json"
    file.write_text(json.dumps(GOOD))
    display.begin("pretrain/lazy", file)
    display.refresh()
    display.set("pretrain/lazy", "waiting")
    display.begin("pretrain/lazy", tmp_path / "absent.json")
    display.refresh()
    assert "50/200" not in rendered(display)
    display.set("pretrain/lazy", "done")
    assert out.getvalue().splitlines()[-1].startswith("pretrain/lazy: done in 0s")


# ---- the live table


def test_the_table_has_a_line_per_node_with_its_state(tmp_path: Path) -> None:
    display, _ = live_display("tokenize", "pretrain/lazy", "report")
    file = tmp_path / "progress.json"
    file.write_text(json.dumps(GOOD))
    display.set("tokenize", "cached")
    display.begin("pretrain/lazy", file)
    display.refresh()
    lines = rendered(display).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["tokenize", "cached"],
        ["pretrain/lazy", "running"],
        ["report", "waiting"],
    ]
    assert "50/200 steps  loss=4.31" in lines[1]


def test_details_are_text_and_not_markup(tmp_path: Path) -> None:
    display, _ = live_display("pretrain/lazy")
    display.begin("pretrain/lazy", tmp_path / "absent.json")
    display.set("pretrain/lazy", "failed", "closing [/nothing] and\n[red]keys[/red]")
    assert "closing [/nothing] and [red]keys[/red]" in rendered(display)


def test_a_live_display_draws_and_stops(tmp_path: Path) -> None:
    display, out = live_display("pretrain/lazy")
    file = tmp_path / "progress.json"
    file.write_text(json.dumps(GOOD))
    display.start()
    display.begin("pretrain/lazy", file)
    display.refresh()
    display.note("a note above")
    display.set("pretrain/lazy", "done", "loss=4.1")
    display.stop()
    display.stop()
    assert "a note above" in out.getvalue() and "loss=4.1" in out.getvalue()


# ---- odd progress files


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"total": 0, "done": 0}, "0/0 steps"),
        ({"done": 500}, "500/200 steps"),
        ({"done": -1}, "-1/200 steps"),
        ({"done": 0.5, "total": 1}, "0.5/1 steps"),
        ({"done": 12345678, "total": 1e12}, "12,345,678/1,000,000,000,000 steps"),
        ({"unit": "[bold]"}, "50/200 [bold]"),
        ({"numbers": {}}, "50/200 steps  0s"),
        ({"numbers": None}, "50/200 steps  0s"),
        (
            {"numbers": {"phase": "writing", "loss": None, "bad": float("nan"), "far": float("inf")}},
            "phase=writing  bad=nan  far=inf",
        ),
        ({"numbers": {"small": 1.5e-5, "lr": 2e-3, "rate": 12345.6}}, "small=1.5e-05  lr=0.002  rate=12,346"),
        ({"numbers": {"list": [1, 2]}}, "list=[1, 2]"),
    ],
)
def test_what_can_be_shown_is_shown(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in shown(tmp_path, json.dumps(GOOD | changes))


@pytest.mark.parametrize("missing", ["done", "total", "time"])
def test_without_what_progress_needs_only_the_time_is_shown(tmp_path: Path, missing: str) -> None:
    text = shown(tmp_path, json.dumps({key: value for key, value in GOOD.items() if key != missing}))
    assert text.split() == ["pretrain/lazy", "running", "0s"]


@pytest.mark.parametrize("missing", ["unit", "numbers"])
def test_what_progress_can_do_without_is_left_out(tmp_path: Path, missing: str) -> None:
    assert "50/200" in shown(tmp_path, json.dumps({key: value for key, value in GOOD.items() if key != missing}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"done": null}',
        json.dumps(GOOD | {"done": "many"}),
        json.dumps(GOOD | {"total": 1e999}),
    ],
)
def test_a_corrupt_progress_file_shows_no_progress_and_breaks_nothing(tmp_path: Path, text: str) -> None:
    assert shown(tmp_path, text).split() == ["pretrain/lazy", "running", "0s"]


def test_a_corrupt_file_keeps_what_was_shown_before(tmp_path: Path) -> None:
    display, _ = live_display("pretrain/lazy")
    file = tmp_path / "progress.json"
    display.begin("pretrain/lazy", file)
    for text in (json.dumps(GOOD), "{", "[]"):
        file.write_text(text)
        display.refresh()
    file.unlink()
    display.refresh()
    assert "50/200 steps" in rendered(display)


def test_no_eta_is_negative_or_infinite(tmp_path: Path) -> None:
    display, _ = live_display("pretrain/lazy")
    file = tmp_path / "progress.json"
    display.begin("pretrain/lazy", file)
    for done, moment in ((50, 1000.0), (50, 1001.0), (40, 1002.0), (60, 999.0), (60, 1000.0)):
        file.write_text(json.dumps(GOOD | {"done": done, "time": moment}))
        display.refresh()
        assert "ETA" not in rendered(display)
    file.write_text(json.dumps(GOOD | {"done": 300, "time": 1010.0}))
    display.refresh()
    assert "ETA 0s" in rendered(display)


@pytest.mark.parametrize(
    ("eta", "expected"),
    [(90.0, "ETA 1m30s"), (-5, "ETA 0s"), (float("nan"), ""), (1e999, ""), ("soon", ""), (None, "")],
)
def test_a_stages_own_estimate_is_shown_when_it_is_a_time(tmp_path: Path, eta: Any, expected: str) -> None:
    text = shown(tmp_path, json.dumps(GOOD | {"numbers": {"eta_s": eta}}))
    assert "50/200 steps" in text and "eta_s" not in text
    assert text.split("0s", 1)[1].strip() == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda below: (
        st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=3) | st.just("eta_s"), below, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, JSON)) | JSON, min_size=1, max_size=3))
def test_no_progress_file_breaks_the_display(files: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("progress") / "progress.json"
    display, _ = live_display("pretrain/lazy")
    display.begin("pretrain/lazy", file)
    for content in files:
        complete = GOOD | content if isinstance(content, dict) else content
        file.write_text(json.dumps(complete))
        display.refresh()
        assert "pretrain/lazy" in rendered(display)


def test_durations_are_read_at_a_glance() -> None:
    texts = [progress._duration(seconds) for seconds in (0, 0.4, 59.4, 59.6, 61, 3599.6, 3661, 90_061)]
    assert texts == ["0s", "0s", "59s", "1m00s", "1m01s", "1h00m", "1h01m", "25h01m"]
