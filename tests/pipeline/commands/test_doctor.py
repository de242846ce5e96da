"""`lazypipe doctor` and `lazypipe status` show paths as they are."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from lazypipe.pipeline.commands import doctor
from lazypipe.pipeline.commands.status import show_status
from lazypipe.stages.contract import UserError


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=400)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", ["[bold]", "[/red]", "a[red]b"])
def test_brackets_in_a_path_are_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console, name: str
) -> None:
    monkeypatch.delenv("LAZYPIPE_HOME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # an earlier test may have made mlflow set it
    monkeypatch.setattr(doctor, "_probed", lambda uri: uri)
    doctor.diagnose(str(tmp_path / name), False, console)
    show_status(None, [], str(tmp_path / name), False, console)
    assert printed(console).count(str((tmp_path / name).resolve())) == 3, "root, MLflow, and an empty store"


def test_the_status_of_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    monkeypatch.delenv("LAZYPIPE_HOME", raising=False)
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is not a directory"):
        show_status(None, [], str(tmp_path / "file"), False, console)
