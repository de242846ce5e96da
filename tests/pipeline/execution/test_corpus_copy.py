"""`tokenize.copy_to` on the command line: a stored corpus is copied without being computed again."""

from pathlib import Path

from tests.pipeline.tiny import FinishedRun, current_manifest, lazypipe


def test_a_stored_corpus_is_copied_when_the_field_is_set(tmp_path: Path, finished_run: FinishedRun) -> None:
    target = tmp_path / "copies/tiny"
    arguments = ("run", finished_run.config, f"tokenize.copy_to=file://{target}")
    result = lazypipe(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    files = current_manifest(finished_run.root, "tokenize")["files"]
    assert f"copied to file://{target}: {len(files)} files" in result.stdout
    assert "everything asked for is cached" in result.stdout
    copied = {str(p.relative_to(target)): p.stat().st_size for p in target.rglob("*") if p.is_file()}
    assert copied.pop("manifest.json") > 0
    assert copied == {name: entry["size"] for name, entry in files.items()}
    assert f"0 files, 0.0 MB sent, {len(files)} were there already" in lazypipe(*arguments).stdout


def test_a_target_that_cannot_be_written_is_refused_before_anything_runs(finished_run: FinishedRun) -> None:
    result = lazypipe(
        "run",
        finished_run.config,
        f"tokenize.copy_to=file://{finished_run.config}/below",
        "tokenize.filters={min_chars: 3}",
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: tokenize.copy_to: 'file://")
    assert "started" not in result.stdout
