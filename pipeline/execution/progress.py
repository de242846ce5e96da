"""What the user sees while stages run: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_INTERVAL_S = 10.0
STYLES = {
    "done": "green",
    "cached": "cyan",
    "failed": "bold red",
    "running": "yellow",
    "blocked": "red",
    "killed": "red",
}


@dataclass
class Line:
    """One node's state on the screen."""

    node_id: str
    state: str
    detail: str = ""
    progress_file: Path | None = None
    started: float = 0.0
    ended: float | None = None
    first: tuple[float, float] | None = None
    latest: dict[str, Any] = field(default_factory=dict)
    last_printed: float = 0.0


class Display:
    """Holds a line per node. `refresh` reads the progress files; call `start`/`stop` around the run."""

    def __init__(self, console: Console, node_ids: list[str]):
        self.console = console
        self.lines = {node_id: Line(node_id, "waiting") for node_id in node_ids}
        self._live = (
            Live(get_renderable=self._table, console=console, refresh_per_second=4) if console.is_terminal else None
        )

    def start(self) -> None:
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, node_id: str, progress_file: Path) -> None:
        line = self.lines[node_id]
        line.state, line.progress_file, line.started = "running", progress_file, time.monotonic()
        line.last_printed, line.ended, line.first, line.latest = line.started, None, None, {}
        self._say(f"{node_id}: started")

    def set(self, node_id: str, state: str, detail: str = "") -> None:
        line = self.lines[node_id]
        if line.state == "running":
            line.ended = time.monotonic()
        line.state, line.detail = state, detail
        took = f" in {_duration(line.ended - line.started)}" if line.ended is not None else ""
        self._say(f"{node_id}: {state}{took}{': ' + detail if detail else ''}")

    def note(self, message: str) -> None:
        """A message above the table."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def refresh(self) -> None:
        """Read the progress of running nodes; without a terminal, print a line now and then."""
        for line in self.lines.values():
            if line.state != "running" or line.progress_file is None:
                continue
            latest = _read_progress(line.progress_file)
            if latest is None:
                continue
            line.latest = latest
            if line.first is None:
                line.first = (latest["time"], latest["done"])
            if self._live is None and time.monotonic() - line.last_printed >= PLAIN_INTERVAL_S:
                line.last_printed = time.monotonic()
                self._say(f"{line.node_id}: {_progress_text(line)}")

    def _say(self, message: str) -> None:
        if self._live is None:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(4):
            table.add_column(overflow="ellipsis", no_wrap=True)
        for line in self.lines.values():
            bar: ProgressBar | Text = Text("")
            text = line.detail.replace("\n", " ")
            if line.state == "running":
                if line.latest:
                    bar = ProgressBar(total=line.latest["total"] or 1, completed=line.latest["done"], width=24)
                text = _progress_text(line)
            elif line.ended is not None:
                text = f"{_duration(line.ended - line.started)}  {text}"
            table.add_row(line.node_id, Text(line.state, STYLES.get(line.state, "dim")), bar, Text(text))
        return table


def _read_progress(path: Path) -> dict[str, Any] | None:
    """A progress file as `Context.progress` writes it, or None while there is none that can be shown."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        done, total, moment = float(found["done"]), float(found["total"]), float(found["time"])
        numbers = {str(name): value for name, value in dict(found.get("numbers") or {}).items()}
        if not all(math.isfinite(number) for number in (done, total, moment)):
            return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return {"done": done, "total": total, "time": moment, "unit": str(found.get("unit", "")), "numbers": numbers}


def _progress_text(line: Line) -> str:
    elapsed = _duration(time.monotonic() - line.started)
    if not line.latest:
        return elapsed
    now = line.latest
    parts = [f"{_number(now['done'])}/{_number(now['total'])} {now['unit']}"]
    numbers = dict(now["numbers"])
    eta = numbers.pop("eta_s", None)
    parts += [f"{name}={_number(value)}" for name, value in numbers.items() if value is not None]
    parts.append(elapsed)
    if eta is None and line.first is not None and now["done"] > line.first[1] and now["time"] > line.first[0]:
        eta = (now["total"] - now["done"]) * (now["time"] - line.first[0]) / (now["done"] - line.first[1])
    if isinstance(eta, (int, float)) and math.isfinite(eta):
        parts.append(f"ETA {_duration(max(0.0, eta))}")
    return "  ".join(parts)


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
