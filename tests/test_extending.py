"""docs/extending.md: every block of the page is applied to a copy of the repository, and its commands are run there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.tiny import current_manifest, write_experiment

PROJECT = Path(__file__).parents[1]
PAGE = PROJECT / "docs" / "extending.md"
BLOCK = re.compile(r"(?:<!-- (?P<where>[^\n]*) -->\n)?```(?P<kind>python|sh)\n(?P<text>.*?)```\n", re.S)


def apply(where: str, text: str, copy: Path) -> None:
    """Change the copy as the comment before a block says: a new file, its end, or a place that exists once."""
    if where.startswith("new file: "):
        path = copy / where.removeprefix("new file: ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    if where.startswith("at the end of "):
        path = copy / where.removeprefix("at the end of ")
        path.write_text(path.read_text(encoding="utf-8") + "\n\n" + text, encoding="utf-8")
        return
    found = re.fullmatch(r"in (\S+), (after|before|replace): (.*)", where)
    assert found is not None, where
    path, how, place = copy / found[1], found[2], found[3]
    source = path.read_text(encoding="utf-8")
    assert source.count(place) == 1, f"{place!r} stands {source.count(place)} times in {found[1]}"
    start = source.rindex("\n", 0, source.index(place)) + 1
    end = source.index("\n", source.index(place)) + 1
    changed = {
        "after": source[:end] + text + source[end:],
        "before": source[:start] + text + source[start:],
        "replace": source.replace(place, text.rstrip("\n")),
    }
    path.write_text(changed[how], encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(folder of the experiment, what each command printed): one copy with all of the page applied, in its order."""
    folder = tmp_path_factory.mktemp("extended")
    copy = folder / "repository"
    for room in ("pipeline", "stages", "model", "kernels"):
        shutil.copytree(PROJECT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "lazypipe", copy / "lazypipe", symlinks=True)
    config = write_experiment(folder)
    text = (
        config.read_text(encoding="utf-8")
        .replace("steps: 60", "steps: 2")
        .replace("warmup_steps: 5", "warmup_steps: 1")
    )
    config.write_text(text.replace("  standard: {mixer: standard}\n", ""), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy), "LAZYPIPE_HOME": str(folder / "output")}
    printed = {}
    commands: list[str] = []
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if block["kind"] == "python":
            apply(block["where"], block["text"], copy)
        else:
            commands += block["text"].splitlines()
    for command in dict.fromkeys(commands):
        program, *arguments = shlex.split(command)
        assert program == "lazypipe"
        result = subprocess.run(
            [sys.executable, "-m", "lazypipe", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        printed[command] = result.stdout
    return folder, printed


def test_the_mechanism_is_listed_trained_and_analysed(extended: tuple[Path, dict[str, str]]) -> None:
    folder, printed = extended
    assert "squared ReLU scores" in printed["lazypipe variants"]
    assert current_manifest(folder / "output", "pretrain", "squared")["config"]["model"]["mixer"] == "squared"
    assert 0 < current_manifest(folder / "output", "sparsity", "squared")["metrics"]["sparsity"] < 1


def test_the_metric_is_measured_and_reported(extended: tuple[Path, dict[str, str]]) -> None:
    folder, printed = extended
    manifest = current_manifest(folder / "output", "sparsity", "lazy")
    assert 0 < manifest["metrics"]["self_weight"] < 1
    page = next((folder / "output" / "store" / "report").rglob("report.md")).read_text(encoding="utf-8")
    assert "self weight" in page and "sorted_heads.png" in page
    assert any("│ self" in text or "self" in text.split() for text in printed.values())


def test_the_data_source_is_read(extended: tuple[Path, dict[str, str]]) -> None:
    folder, _ = extended
    kinds = {
        json.loads(path.read_text(encoding="utf-8"))["facts"]["source"]["kind"]
        for path in (folder / "output" / "store" / "tokenize").rglob("manifest.json")
    }
    assert kinds == {"files", "python"}


def test_the_stage_is_a_node_of_the_experiment(extended: tuple[Path, dict[str, str]]) -> None:
    folder, _ = extended
    manifest = current_manifest(folder / "output", "vocabulary")
    assert len(manifest["facts"]["top"]) == 3 and manifest["metrics"]["tokens_used"] > 10
