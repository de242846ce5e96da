"""Which files are a stage's code, and which changes of them count."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lazypipe.pipeline.planning.code_version import PACKAGE
from lazypipe.pipeline.planning.stage_sources import CACHE_FILE, ROOMS, SyntaxTrees, parsed, stage_digest, stage_files
from lazypipe.stages.registry import STAGES

MIXERS = ("lazy", "standard", "mlp", "static_qk")


@pytest.fixture(scope="module")
def trees() -> SyntaxTrees:
    """Shared, so that each file is parsed once."""
    return SyntaxTrees(None)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the packages that compute results, to edit."""
    for room in ROOMS:
        for path in (PACKAGE / room).rglob("*.py"):
            target = tmp_path / "lazypipe" / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return tmp_path / "lazypipe"


def digests(package: Path, trees: SyntaxTrees) -> dict[str, str]:
    return {row.name: stage_digest(package, row.function, trees) for row in STAGES}


def changed_by(package: Path, file: str, old: str, new: str, trees: SyntaxTrees) -> set[str]:
    """The stages whose code has changed after an edit of a file."""
    path = package / file
    before, text = digests(package, trees), path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    after = digests(package, trees)
    return {name for name in after if after[name] != before[name]}


def test_a_stage_is_made_of_what_its_function_imports(trees: SyntaxTrees) -> None:
    files = {
        row.name: {path.relative_to(PACKAGE).as_posix() for path in stage_files(PACKAGE, row.function, trees)}
        for row in STAGES
    }
    assert {f"model/mixers/{name}.py" for name in MIXERS} <= files["pretrain"] & files["evaluate"] & files["sparsity"]
    assert {"kernels/api.py", "stages/data/shards.py", "stages/contract.py"} <= files["pretrain"]
    assert "stages/evaluate/benchmarks/harness.py" in files["evaluate"], "it is imported inside a function"
    assert not any(name.startswith(("model/", "kernels/")) for name in files["tokenize"])
    for row in STAGES:
        folder = row.function.split(".")[2]
        assert f"stages/{folder}/stage.py" in files[row.name]
        assert "stages/registry.py" not in files[row.name], f"{row.name} would change with every stage"


def test_an_edit_marks_the_stages_that_import_the_file(copied: Path, trees: SyntaxTrees) -> None:
    models = {"pretrain", "evaluate", "sparsity"}
    first_import = ("\nimport ", "\nEDITED = 1\nimport ")
    assert changed_by(copied, "stages/report/findings.py", "\nfrom ", "\nEDITED = 1\nfrom ", trees) == {"report"}
    assert changed_by(copied, "kernels/api.py", *first_import, trees) == models
    assert changed_by(copied, "model/mixers/lazy.py", *first_import, trees) == models
    assert changed_by(copied, "stages/pretrain/trainer.py", *first_import, trees) == {"pretrain"}
    assert changed_by(copied, "stages/evaluate/benchmarks/harness.py", "\nimport ", "\nx = 1\nimport ", trees) == {
        "evaluate"
    }
    assert changed_by(copied, "stages/contract.py", *first_import, trees) == {row.name for row in STAGES}


def test_comments_docstrings_and_layout_mark_nothing(copied: Path, trees: SyntaxTrees) -> None:
    comment = ("\nimport ", "\n\n# A comment.\n\nimport ")
    assert changed_by(copied, "stages/contract.py", '"""The stage contract', '"""The contract', trees) == set()
    assert changed_by(copied, "stages/contract.py", *comment, trees) == set()
    assert changed_by(copied, "kernels/api.py", *comment, trees) == set()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("def f(a):\n    'x'\n    return a", "def f(a):  # b\n    return a", True),
        ("class A:\n    b: int\n    'of b'", "class A:\n\n    b: int", True),
        ("x = 'a' 'b'", 'x = "ab"', True),
        ("x = 1", "x = 1.0", False),
        ("x = 1", "x = True", False),
        ("x = None", "x = 'None'", False),
        ("x = [[1], 2]", "x = [[1, 2]]", False),
        ("x = a - (b - c)", "x = a - b - c", False),
        ("f(a, b=c)", "f(a, c)", False),
        ("def f(a, /, b): ...", "def f(a, b): ...", False),
    ],
)
def test_what_counts_as_the_same_code(one: str, other: str, same: bool) -> None:
    assert (parsed(one.encode())[0] == parsed(other.encode())[0]) is same


def test_what_counts_as_an_import() -> None:
    source = b"""
import lazypipe.model.config
from lazypipe import kernels
from lazypipe.stages import figures
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import lazypipe.model.costs
def later():
    import torch.nn
    from lazypipe.stages.data.shards import TokenShards
ROW = {"source": "lazypipe.model.mixers.lazy:LazyAttention", "text": "see lazypipe.model.rope for more"}
"""
    assert parsed(source)[1] == [
        *("kernels", "model.config"),
        *("stages", "stages.data.shards", "stages.data.shards.TokenShards", "stages.figures"),
        *("text:model.mixers.lazy", "torch"),
    ]


def test_parsed_files_are_kept_by_content(tmp_path: Path, trees: SyntaxTrees) -> None:
    row = STAGES[0]
    kept = SyntaxTrees(tmp_path / "cache")
    digest = stage_digest(PACKAGE, row.function, kept)
    kept.save()
    assert (tmp_path / "cache" / CACHE_FILE).is_file()
    assert stage_digest(PACKAGE, row.function, SyntaxTrees(tmp_path / "cache")) == digest
    assert digest == stage_digest(PACKAGE, row.function, trees)
    (tmp_path / "cache" / CACHE_FILE).write_text("[]")
    assert stage_digest(PACKAGE, row.function, SyntaxTrees(tmp_path / "cache")) == digest
