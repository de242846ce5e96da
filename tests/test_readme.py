"""What the documents point at exists, and every command they name is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lazypipe.pipeline.cli import app

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not t.startswith("http")]
    assert [t for t in targets if not (page.parent / t).exists()] == []
    assert "@@" not in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    known = {(c.name or c.callback.__name__) for c in app.registered_commands if c.callback is not None}
    named = set(re.findall(r"(?:^|[`/ ])lazypipe ([a-z]+)\b", page.read_text(encoding="utf-8"), flags=re.M))
    assert named - known - {"is", "and", "runs"} == set()


def test_every_command_is_in_the_readme() -> None:
    known = {(c.name or c.callback.__name__) for c in app.registered_commands if c.callback is not None}
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert [name for name in known if f"`lazypipe {name}" not in text] == []
