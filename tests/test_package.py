"""The wheel: one top-level package, which runs where a user's files bear the names of our folders."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.pipeline.tiny import write_experiment

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    command = [sys.executable, "-m", "pip", "wheel", *options, str(PROJECT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("lazypipe-*.whl")
    return built


def test_the_wheel_holds_one_package_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"lazypipe"}
    rooms = ("pipeline", "stages", "model", "kernels")
    ours = {p.relative_to(PROJECT).as_posix() for room in rooms for p in (PROJECT / room).rglob("*") if p.is_file()}
    expected = {f"lazypipe/{name}" for name in ours if "__pycache__" not in name}
    assert expected | {"lazypipe/py.typed", "lazypipe/__main__.py"} <= set(names)


def test_the_wheel_runs_beside_files_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    """A working directory with the user's model.py, stages.py and kernels.py, and a package `kernels` installed."""
    installed, work = tmp_path / "installed", tmp_path / "work"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    (installed / "kernels").mkdir()
    (installed / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n", encoding="utf-8")
    work.mkdir()
    for name in ("model", "stages", "kernels"):
        (work / f"{name}.py").write_text("mine = True\n", encoding="utf-8")
    config = write_experiment(work)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("TRITON_INTERPRET", None)

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        result = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    ours = "import lazypipe, model, stages, kernels; from lazypipe.kernels import lazy_attention; "
    shown = python("-c", ours + "print(lazypipe.__file__, model.mine, stages.mine, kernels.mine)")
    assert shown.split() == [str(installed / "lazypipe" / "__init__.py"), "True", "True", "True"]
    python("-m", "lazypipe", "run", str(config), "--only", "pretrain/lazy", "--local")
    assert list((work / "output" / "store" / "pretrain").glob("*/current"))
