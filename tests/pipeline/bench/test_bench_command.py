"""`lazypipe bench` finds its benchmarks, and each refuses wrong values in one line, before it measures anything."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lazypipe.pipeline.bench.options import exit_code
from lazypipe.pipeline.cli import BENCHMARKS, app
from lazypipe.stages.contract import UserError

PROJECT = Path(__file__).parents[3]


def test_help_lists_them_and_each_is_there() -> None:
    result = CliRunner().invoke(app, ["bench", "--help"])
    lines = result.output.splitlines()
    assert result.exit_code == 0 and lines[0].startswith("Usage: lazypipe bench WHAT")
    assert [line.split()[0] for line in lines[1:]] == list(BENCHMARKS)
    assert all(description in result.output for _, description in BENCHMARKS.values())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_has_help_and_refuses_wrong_values_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"lazypipe.pipeline.bench.{BENCHMARKS[name][0]}").main
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr()
    assert end.value.code == 0 and said.out.startswith(f"usage: lazypipe bench {name} ")
    number = {"checkpoint": "--rounds", "pretrain": "--turns"}.get(name, "--repeats")
    target = ["anywhere"] if name == "generate" else []
    for wrong, message in (
        ([number, "0"], f"{number} 0: must be at least 1"),
        ([number, "many"], f"argument {number}: invalid int value: 'many'; see lazypipe bench {name} --help"),
        (["--nothing"], f"unrecognized arguments: --nothing; see lazypipe bench {name} --help"),
    ):
        assert exit_code(main, [*target, *wrong]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", f"error: {message}\n")


def test_an_unknown_one_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="bench kernel: there is no such benchmark; did you mean 'kernels'"):
        CliRunner().invoke(app, ["bench", "kernel"], catch_exceptions=False)


def test_the_kernels_are_timed_where_only_torch_and_triton_are_installed() -> None:
    code = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("typer", "pydantic", "pyarrow", "rich", "ray", "mlflow", "ruamel", "psutil", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
runpy.run_module("lazypipe.pipeline.bench.kernels", run_name="__main__", alter_sys=True)
"""
    sizes = ["--length", "32", "--heads", "1", "--head-dim", "16", "--window", "8", "--steep-share", "0"]
    options = [*sizes, "--device", "cpu", "--mode", "forward", "--repeats", "1", "--no-memory", "--matmul-tflops", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| blockwise " in done.stdout and "| 95 % " in done.stdout


def test_checkpoints_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("lazypipe.pipeline.bench.checkpoint").main
    assert main(["--hidden-size", "16", "--num-layers", "1", "--steps", "2", "--rounds", "2"]) == 0
    first, *ways = capsys.readouterr().out.splitlines()
    assert "M parameters, checkpoint of" in first
    assert [line.split("  ")[0] for line in ways] == ["at once", "background"]
    assert all("held up" in line and line.endswith("of one without") for line in ways)
    with pytest.raises(UserError, match="--hidden-size 20: must be a multiple of 16"):
        main(["--hidden-size", "20"])


def test_sums_of_several_workers_are_timed() -> None:
    """In a process of its own, as its workers print."""
    command = [sys.executable, "-m", "lazypipe.pipeline.bench.reduction", "--parameters", "1000", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--micro-batches", "2", "3"], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["2", "3"] and all(float(row[3]) >= 0 for row in rows)
