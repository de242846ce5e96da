"""`lazypipe doctor`: is this machine able to run experiments, and if not, what to do about it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lazypipe.pipeline.execution.execute import RECORDED_VERSIONS
from lazypipe.pipeline.experiment.schema import resolve_root
from lazypipe.pipeline.tracking.uri import probe, tracking_uri
from lazypipe.stages.contract import UserError
from lazypipe.stages.registry import STAGES

Check = tuple[str, bool, str]


def diagnose(root_option: str | None, as_json: bool, console: Console) -> int:
    """Print a line per check; returns 0 when nothing that every experiment needs is missing, else 1."""
    root = resolve_root(None, root_option)
    uri = tracking_uri(root)
    existing = next(p for p in (root, *root.parents) if p.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    checks: list[Check] = [
        ("python", sys.version_info >= (3, 11), platform.python_version()),
        *(_package(name) for name in RECORDED_VERSIONS if name != "triton"),
        ("cores", True, str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())),
        _attempt("torch device", _device),
        _attempt("embedded corpus", _corpus),
        ("root", os.access(existing, os.W_OK), f"{root} ({free_gib:.0f} GiB free)"),
        _attempt("MLflow", lambda: _probed(uri)),
    ]
    if as_json:
        print(json.dumps([{"check": name, "ok": ok, "detail": detail} for name, ok, detail in checks], indent=1))
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, ok, detail in checks:
            # As Text: a path with brackets is no markup.
            table.add_row(Text("ok", "green") if ok else Text("missing", "bold red"), Text(name), Text(detail))
        console.print(table)
    return 0 if all(ok for _, ok, _ in checks) else 1


def _package(name: str) -> Check:
    try:
        return (name, True, version(name))
    except PackageNotFoundError:
        return (name, False, "not installed; see README, 'Set-up'")


def _attempt(name: str, action: Callable[[], str]) -> Check:
    try:
        return (name, True, action())
    except (UserError, ImportError) as error:
        return (name, False, str(error))


def _corpus() -> str:
    sizes = [row.corpus.check(row.config(), None, min_tokens=1) for row in STAGES if row.corpus is not None]
    return f"{sum(sizes):,} bytes"


def _probed(uri: str) -> str:
    probe(uri)
    return uri


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU ({torch.get_num_threads()} threads); Lazy Attention uses its blockwise kernel"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda}); Lazy Attention uses its Triton kernel"
