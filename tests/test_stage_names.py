"""Nobody knows a stage by name but its own folder, the table of stages, and those who read its result."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazypipe.stages.contract import UserError
from lazypipe.stages.registry import STAGES, in_order
from lazypipe.stages.stage_row import StageRow, load_function

PROJECT = Path(__file__).parents[1]
NAMES = {row.name for row in STAGES}
FOLDERS = {row.function.split(".")[2]: row for row in STAGES}
ALLOWED = {
    ("pipeline/execution/run.py", "lazypipe.stages.report.table"),  # a run prints the report
}


def naming(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of every text that is a stage or a node of one, attribute of that name, and import from a folder."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.partition("/")[0] in NAMES:
            yield node.lineno, node.value
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            yield node.lineno, f".{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in NAMES:
            yield node.value.lineno, f"{node.arg}="
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lazypipe.stages"):
            names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
            if any(name.split(".")[2:3] and name.split(".")[2] in FOLDERS for name in names):
                yield node.lineno, node.module or ""


def benchmark_names(tree: ast.AST) -> set[int]:
    """Lines of the table BENCHMARKS: some benchmarks are called as the stage that they measure."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "BENCHMARKS" for target in node.targets):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def test_the_pipeline_names_no_stage() -> None:
    said = []
    for path in sorted((PROJECT / "pipeline").rglob("*.py")):
        file = path.relative_to(PROJECT).as_posix()
        if file.startswith("pipeline/bench/"):  # a benchmark is of one stage
            continue
        tree = ast.parse(path.read_bytes())
        table = benchmark_names(tree)
        said += [
            f"{file}:{line}: {what}" for line, what in naming(tree) if line not in table and (file, what) not in ALLOWED
        ]
    assert said == []


def test_what_counts_as_naming_a_stage() -> None:
    source = """
from lazypipe.stages import evaluate
from lazypipe.stages.pretrain.config import PretrainConfig
if node.stage == "tokenize" or experiment.report or plan[f"sparsity/{name}"]:
    find(pretrain=1, text="evaluate.tasks")
"""
    assert [what for _, what in sorted(naming(ast.parse(source)))] == [
        *("lazypipe.stages", "lazypipe.stages.pretrain.config"),
        *(".report", "sparsity/", "tokenize", "pretrain="),
    ]


def compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, stage) of every text in a comparison or a match, and of every input that is read by name."""
    for node in ast.walk(tree):
        inside: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            inside = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            inside = [node.value]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("inputs"):
            inside = [node.slice]
        for expression in inside:
            for part in ast.walk(expression):
                if isinstance(part, ast.Constant) and part.value in NAMES:
                    yield node.lineno if hasattr(node, "lineno") else 0, str(part.value)


def test_a_stage_names_only_itself_and_its_inputs() -> None:
    said = []
    for path in sorted((PROJECT / "stages").rglob("*.py")):
        folder = path.relative_to(PROJECT / "stages").parts[0]
        known = {FOLDERS[folder].name, *FOLDERS[folder].inputs} if folder in FOLDERS else set()
        if folder != "registry.py":
            names = compared(ast.parse(path.read_bytes()))
            said += [f"{path.relative_to(PROJECT)}:{line}: {name}" for line, name in names if name not in known]
    assert said == []


# ---- the table


def row_named(name: str, *inputs: str) -> StageRow:
    base = STAGES[0]
    return StageRow(
        name=name, description="", function=base.function, config=base.config, facts=base.facts, inputs=inputs
    )


def test_the_order_comes_from_the_inputs() -> None:
    assert [row.name for row in in_order(reversed(STAGES))][0::4] == ["tokenize", "report"]
    prune, measure = row_named("prune", "pretrain"), row_named("measure", "prune", "tokenize")
    names = [row.name for row in in_order([measure, prune, *STAGES])]
    assert names.index("pretrain") < names.index("prune") < names.index("measure")
    with pytest.raises(UserError, match="stage prune: its input 'pretrain' is no stage"):
        in_order([prune])
    with pytest.raises(UserError, match="the stages a, b wait for each other"):
        in_order([row_named("a", "b"), row_named("b", "a")])


@pytest.mark.parametrize("row", STAGES, ids=lambda row: row.name)
def test_what_a_row_names_exists(row: StageRow) -> None:
    for place in (row.function, row.prepare_worker, row.check_publish, row.publish):
        assert place is None or callable(load_function(place))
    config = row.config()
    assert row.map_workers(config) == 1
    assert not row.map_workers_key or row.map_workers_key in row.config.model_fields
    assert all(field in row.config.model_fields for field in row.from_experiment or {})
    assert {window.split for window in row.windows(config)} <= {"train", "validation"}
