"""The rooms of the repository: how large a folder and a function may be, and that every path written down exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ROOMS = ("pipeline", "stages", "model", "kernels")
FILES_IN_A_FOLDER = 16  # beside __init__.py
# One file per mechanism: a folder that grows with the table it fills.
COLLECTIONS = {"model/mixers"}
LINES_OF_A_FUNCTION = 70


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((PROJECT / room).rglob("*.py"))]


def test_no_folder_holds_more_files_than_one_looks_through() -> None:
    counts: dict[str, int] = {}
    for path in sources():
        if path.name != "__init__.py":
            folder = path.parent.relative_to(PROJECT).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    assert len(counts) > 15
    assert {f: n for f, n in counts.items() if n > FILES_IN_A_FOLDER and f not in COLLECTIONS} == {}


def test_no_function_is_longer_than_two_screens() -> None:
    """Kernels are excepted: a Triton kernel is one function by nature, and the blockwise passes mirror it."""
    long = {}
    for path in sources():
        if path.is_relative_to(PROJECT / "kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > LINES_OF_A_FUNCTION:
                    long[f"{path.relative_to(PROJECT)}:{node.name}"] = lines
    assert long == {}


PATH = re.compile(
    r"(?<![\w./-])(?:pipeline|stages|model|kernels|configs|tests|docs|lazypipe)/[\w./-]*\w\.(?:py|yaml|json|md|j2)\b"
)
DOTTED = re.compile(r"(?<![\w.-])lazypipe\.(?:pipeline|stages|model|kernels)(?:\.[a-z][a-z_0-9]*)*")
PAGES = ("README.md", "Makefile", "pyproject.toml", "ray_cluster.yaml")


def written() -> list[Path]:
    pages = [PROJECT / name for name in PAGES] + sorted((PROJECT / "docs").glob("*.md"))
    return pages + sources() + sorted((PROJECT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", written(), ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_every_path_that_is_written_somewhere_exists(path: Path) -> None:
    """In code, docstrings, comments and pages: files by path from the root, modules by dotted name."""
    text = path.read_text(encoding="utf-8")
    new = set(re.findall(r"<!-- new file: (\S+) -->", text))  # the examples of docs/extending.md
    absent = {name for name in PATH.findall(text) if not (PROJECT / name).exists()}
    assert absent - WRITTEN_LATER - new == set()
    modules = {f"lazypipe.{name.removesuffix('.py').replace('/', '.')}" for name in new}
    assert {name for name in DOTTED.findall(text) if not is_module_or_attribute(name)} - modules == set()


# What a command writes that a page describes.
WRITTEN_LATER = {"docs/benchmarks.gpu.json"}


def is_module_or_attribute(name: str) -> bool:
    """Whether the first parts of a dotted name are a module, and what follows is named in its source."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        stem = PROJECT.joinpath(*parts[:count])
        source = stem.with_suffix(".py") if stem.with_suffix(".py").is_file() else stem / "__init__.py"
        if source.is_file():
            rest = parts[count:]
            return not rest or re.search(rf"\b{rest[0]}\b", source.read_text(encoding="utf-8")) is not None
    return False
