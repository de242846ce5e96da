"""Who may import whom, and what planning must not load."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from lazypipe.model.config import ModelConfig
from lazypipe.stages.pretrain.config import PretrainConfig

PROJECT = Path(__file__).parents[1]
ROOMS = ("pipeline", "stages", "kernels", "model")


def loaded_by(code: str, watched: set[str]) -> list[str]:
    """Which of the watched packages a fresh interpreter has loaded after running `code`."""
    report = f"{code}\nimport sys\nprint(*sorted({watched!r} & sys.modules.keys()))"
    command = [sys.executable, "-c", report]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout.split()


def test_imports_point_downwards_and_only_the_pipeline_knows_ray_and_mlflow(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(PROJECT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_the_command_line_and_planning_load_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "from lazypipe.pipeline import cli\n"
        "from lazypipe.pipeline.planning import plan, preflight\n"
        "from lazypipe.pipeline.execution import run\n"
        "from lazypipe.pipeline.commands import status"
    )
    heavy = {"torch", "ray", "mlflow", "datasets", "transformers", "tokenizers", "matplotlib", "triton"}
    assert loaded_by(code, heavy) == []


def test_training_loads_no_data_set_or_plotting_library() -> None:
    """A GPU box needs torch, numpy, pyarrow, safetensors and pydantic alone."""
    others = {"ray", "mlflow", "datasets", "transformers", "tokenizers", "matplotlib", "jinja2", "typer", "psutil"}
    assert loaded_by("import lazypipe.stages.pretrain.stage", others) == []


def test_the_kernels_need_nothing_but_torch_and_triton() -> None:
    graph = grimp.build_graph("lazypipe", include_external_packages=True, cache_dir=None)
    ours = [module for module in graph.modules if module.startswith("lazypipe.kernels.")]
    imported = set().union(*(graph.find_modules_directly_imported_by(module) for module in ours))
    outside = {module for module in imported if graph.is_module_squashed(module)} - set(sys.stdlib_module_names)
    assert outside == {"torch", "triton"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count, those for type checkers alone do not."""
    graph = grimp.build_graph("lazypipe", cache_dir=None, exclude_type_checking_imports=True)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # CycleError names the modules


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((PROJECT / room).rglob("*.py"))]


def test_no_module_bears_the_name_of_one_of_the_standard_library() -> None:
    """Run by path, a file's folder is first on sys.path: a tokenize.py there would replace the library's."""
    assert len(sources()) > 30
    named = {path.stem for path in sources()} | {path.name for path in PROJECT.iterdir() if path.is_dir()}
    assert not named & set(sys.stdlib_module_names)


def test_model_and_pretrain_fields_are_disjoint() -> None:
    """A variant's flat keys are looked up in both."""
    assert not set(ModelConfig.model_fields) & set(PretrainConfig.model_fields)
