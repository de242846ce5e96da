"""The warnings of a stage as `Context.warn` of stages/contract.py writes them: read back, merged, put into words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_warnings(scratch_dir: Path) -> list[dict[str, Any]]:
    """All warnings of a stage so far, interrupted executions included: {message, step or None, ranks}, oldest first.

    The same message at the same step is one, with every rank that wrote it.
    """
    lines = []
    for path in sorted(scratch_dir.glob("warnings-*.jsonl")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # gone this moment: the scratch is removed when a stage has committed
            continue
        lines += [entry for line in text.splitlines() if (entry := _parsed(line)) is not None]
    merged: dict[tuple[str, int | None], set[int]] = {}
    for entry in sorted(lines, key=lambda entry: float(entry["time"])):
        merged.setdefault((entry["message"], entry["step"]), set()).add(entry["rank"])
    return [{"message": message, "step": step, "ranks": sorted(ranks)} for (message, step), ranks in merged.items()]


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of a warnings file; None while it is being written, or when a kill left half of it."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


def warning_text(entry: str | Mapping[str, Any]) -> str:
    """A warning of a manifest in words: "step 5: loss nan (rank 1)". Manifests of before hold the message alone."""
    if isinstance(entry, str):
        return entry
    step = "" if entry["step"] is None else f"step {entry['step']}: "
    ranks = entry.get("ranks", [0])
    return f"{step}{entry['message']}" + ("" if 0 in ranks else f" (rank {', '.join(map(str, ranks))})")
