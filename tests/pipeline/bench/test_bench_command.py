"""`lazypipe bench` finds its benchmarks."""

import importlib

import pytest
from typer.testing import CliRunner

from lazypipe.pipeline.cli import BENCHMARKS, app
from lazypipe.stages.contract import UserError


def test_help_lists_them_and_each_is_there() -> None:
    result = CliRunner().invoke(app, ["bench", "--help"])
    assert result.exit_code == 0 and all(name in result.output for name in BENCHMARKS)
    for module, function in BENCHMARKS.values():
        assert callable(getattr(importlib.import_module(module), function))


def test_an_unknown_one_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="bench kernel: there is no such benchmark; did you mean 'kernels'"):
        CliRunner().invoke(app, ["bench", "kernel"], catch_exceptions=False)
