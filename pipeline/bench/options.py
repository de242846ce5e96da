"""The command lines of the benchmarks: every wrong value is one line, and exit code 2.

Each benchmark has `main(arguments) -> exit code`; `lazypipe bench WHAT` and `python -m lazypipe.pipeline.bench.MODULE`
call it. Needs the standard library alone: the kernels are timed where only torch and triton are installed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lazypipe.stages.contract import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of `lazypipe bench NAME` with UserError for what it cannot parse."""

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(
            prog=f"lazypipe bench {name}",
            description=description,
            epilog="Ratios are medians over rounds with a 95 % interval; of fewer than 6 rounds it is their range.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def check_at_least(options: argparse.Namespace, **smallest: float) -> None:
    """UserError for the first option whose value, or one of whose values, is below the smallest; None is left out."""
    for name, least in smallest.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if not value >= least:
                raise UserError(f"--{name.replace('_', '-')} {value:g}: must be at least {least:g}")


def check_writable(option: str, path: Path | None) -> None:
    """UserError when a file of results could not be written in the end."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: {path.parent} is no folder; create it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written; give a file in a folder that is writable")


def exit_code(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a benchmark as a command of its own: what `lazypipe` does with a UserError."""
    try:
        return main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
