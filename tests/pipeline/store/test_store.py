"""The stage store: a reader sees a whole generation or none, whatever happens while one is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lazypipe.pipeline.store import store as store_module
from lazypipe.pipeline.store.store import MANIFEST, Entry, Generation, Store, read_generation
from lazypipe.stages.contract import write_atomically

PRINT = "0123456789abcdef" * 4
BODY: dict[str, Any] = {"fingerprint": PRINT, "inputs": {}, "metrics": {"loss": 1.5}, "facts": {}, "config": {}}


def entry_in(root: Path) -> Entry:
    entry = Store(root).entry("pretrain", PRINT)
    entry.path.mkdir(parents=True)
    return entry


def fill(entry: Entry, name: str, text: str) -> Path:
    directory = entry.path / name
    (directory / "tables").mkdir(parents=True)
    (directory / "weights.bin").write_text(text)
    (directory / "tables" / "loss.json").write_text("[]")
    return directory


def committed(root: Path, text: str = "first") -> tuple[Entry, Generation]:
    entry = entry_in(root)
    name = entry.next_generation()
    fill(entry, name, text)
    return entry, entry.commit(name, BODY)


def current(entry: Entry) -> Generation:
    generation = entry.current()
    assert generation is not None
    return generation


def edit_manifest(generation: Generation, **changes: Any) -> None:
    path = generation.path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- committing


def test_a_committed_generation_is_current_whole_and_listed(tmp_path: Path) -> None:
    entry, generation = committed(tmp_path)
    assert entry.path == tmp_path / "store" / "pretrain" / PRINT[:12]
    assert current(entry).manifest == generation.manifest
    assert generation.id == f"pretrain/{PRINT[:12]}/g0001"
    assert generation.fingerprint == PRINT and generation.artifact().metrics == {"loss": 1.5}
    assert set(generation.manifest["files"]) == {"weights.bin", "tables/loss.json"}
    assert generation.problem() is None and generation.problem(full=True) is None and entry.damage() is None
    assert [g.id for g in Store(tmp_path).generations("pretrain")] == [generation.id]
    assert Store(tmp_path).generations("tokenize") == []


def test_generations_are_numbered_onwards_past_gaps_and_four_digits(tmp_path: Path) -> None:
    entry = entry_in(tmp_path)
    assert entry.next_generation() == "g0001"
    fill(entry, "g0003", "x")
    assert entry.next_generation() == "g0004"
    (entry.path / "g9999").mkdir()
    (entry.path / "g10000").mkdir()
    (entry.path / "g0001 (copy)").mkdir()
    (entry.path / "g77777").write_text("a file is no generation")
    assert entry.next_generation() == "g10001"


@pytest.mark.parametrize("crash_at", [MANIFEST, "current"])
@pytest.mark.parametrize("has_earlier", [True, False])
def test_a_crash_while_committing_leaves_the_earlier_generation_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: str, has_earlier: bool
) -> None:
    entry = committed(tmp_path)[0] if has_earlier else entry_in(tmp_path)
    name = entry.next_generation()
    fill(entry, name, "second")
    write = write_atomically

    def crash(path: Path, text: str) -> None:
        if path.name == crash_at:
            raise OSError("no space left on device")
        write(path, text)

    monkeypatch.setattr(store_module, "write_atomically", crash)
    with pytest.raises(OSError, match="no space left"):
        entry.commit(name, BODY)
    monkeypatch.undo()

    generation = entry.current()
    if has_earlier:
        assert generation is not None and generation.problem(full=True) is None
        assert (generation.path / "weights.bin").read_text() == "first"
    elif crash_at == MANIFEST:
        assert generation is None
    else:  # complete but for the pointer: nothing is computed again
        assert generation is not None and generation.problem(full=True) is None
        assert (generation.path / "weights.bin").read_text() == "second"
    assert entry.damage() is None
    assert entry.sweep() == ([name] if crash_at == MANIFEST else [])
    again = entry.next_generation()
    fill(entry, again, "third")
    assert entry.commit(again, BODY).problem(full=True) is None
    assert (current(entry).path / "weights.bin").read_text() == "third"


def test_the_files_are_complete_before_the_manifest_and_the_manifest_before_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_in(tmp_path)
    directory = fill(entry, "g0001", "x")
    written = []
    write = write_atomically

    def watch(path: Path, text: str) -> None:
        written.append(path.name)
        if path.name == MANIFEST:
            assert set(json.loads(text)["files"]) == {"weights.bin", "tables/loss.json"}
            assert not (entry.path / "current").exists()
        else:
            assert read_generation(directory).problem(full=True) is None
        write(path, text)

    monkeypatch.setattr(store_module, "write_atomically", watch)
    entry.commit("g0001", BODY)
    assert written == [MANIFEST, "current"]


def test_a_commit_empties_the_scratch_directory(tmp_path: Path) -> None:
    entry = entry_in(tmp_path)
    (entry.open_scratch({}, fresh=False) / "checkpoint").write_text("x")
    fill(entry, "g0001", "x")
    entry.commit("g0001", BODY)
    assert not entry.scratch.exists()


def test_half_written_generations_are_swept_and_nothing_else(tmp_path: Path) -> None:
    entry, generation = committed(tmp_path)
    fill(entry, "g0002", "half")
    (entry.path / "g0002 (my copy)").mkdir()
    (entry.path / "g0003").write_text("a file")
    (entry.path / "notes").mkdir()
    assert entry.sweep() == ["g0002"]
    assert {p.name for p in entry.path.iterdir()} == {"g0001", "g0002 (my copy)", "g0003", "notes", "current"}
    assert current(entry).id == generation.id and entry.sweep() == []


# ---- damage


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    _, generation = committed(tmp_path)
    (generation.path / "tables" / "loss.json").unlink()
    assert "loss.json is missing" in str(generation.problem())


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    _, generation = committed(tmp_path)
    (generation.path / "weights.bin").write_text("fir")
    assert "weights.bin has 3 bytes, expected 5" in str(generation.problem())


def test_other_content_of_the_same_size_is_noticed_by_its_mtime_or_by_a_full_check(tmp_path: Path) -> None:
    _, generation = committed(tmp_path)
    file = generation.path / "weights.bin"
    before = file.stat()
    file.write_text("fIrst")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert "weights.bin does not match its sha256" in str(generation.problem())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert generation.problem() is None, "sizes and mtimes alone cannot tell"
    assert "weights.bin does not match its sha256" in str(generation.problem(full=True))


def test_a_moved_mtime_with_the_same_content_is_no_damage(tmp_path: Path) -> None:
    _, generation = committed(tmp_path)
    os.utime(generation.path / "weights.bin", ns=(1, 1))
    assert generation.problem() is None


def test_a_file_beside_the_listed_ones_is_no_damage(tmp_path: Path) -> None:
    _, generation = committed(tmp_path)
    (generation.path / "my notes.txt").write_text("look at head 3")
    assert generation.problem(full=True) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"text"', "{}", '{"format": 1}', "\x00\xff"],
)
def test_an_unreadable_manifest_is_damage_and_raises_nothing_else(tmp_path: Path, text: str) -> None:
    entry, generation = committed(tmp_path)
    (generation.path / MANIFEST).write_text(text, encoding="latin-1")
    damage = entry.damage()
    assert damage is not None and "current" in damage
    with pytest.raises((OSError, ValueError)):
        entry.current()
    assert Store(tmp_path).generations("pretrain") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": 2}, "has format 2, expected 1"),
        ({"format": None}, "has format None, expected 1"),
        ({"files": []}, "files: expected a mapping"),
        ({"files": {"weights.bin": 5}}, "files: weights.bin: expected size, mtime_ns and sha256"),
        ({"files": {"weights.bin": {"size": 5}}}, "files: weights.bin: expected size, mtime_ns and sha256"),
        ({"inputs": None}, "inputs: expected a mapping"),
        ({"inputs": {"tokenize": "g0001"}}, "inputs: tokenize: expected fingerprint and generation"),
    ],
)
def test_a_foreign_manifest_is_damage(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    entry, generation = committed(tmp_path)
    edit_manifest(generation, **changes)
    assert expected in str(entry.damage())


def test_a_lost_generation_is_damage_and_not_an_empty_entry(tmp_path: Path) -> None:
    entry, generation = committed(tmp_path)
    (generation.path / MANIFEST).unlink()
    assert MANIFEST in str(entry.damage())


@pytest.mark.parametrize("text", ["", "g0009\n", "\n", "../../g0001", "a\x00b", "\xff"])
def test_a_damaged_current_is_damage(tmp_path: Path, text: str) -> None:
    entry, _ = committed(tmp_path)
    (entry.path / "current").write_text(text, encoding="latin-1")
    assert entry.damage() is not None


def test_without_current_the_newest_intact_generation_is_adopted(tmp_path: Path) -> None:
    entry, first = committed(tmp_path)
    for name in ("g9999", "g10000"):
        fill(entry, name, name)
        entry.commit(name, BODY)
    fill(entry, "g10001", "half")
    (entry.path / "current").unlink()
    assert current(entry).path.name == "g10000" and entry.damage() is None
    (entry.path / "g10000" / "weights.bin").write_text("cut")
    assert current(entry).path.name == "g9999"
    (entry.path / "g9999" / MANIFEST).write_text("[]")
    assert current(entry).id == first.id
    assert [g.id for g in Store(tmp_path).generations("pretrain")] == [first.id]
    assert not (entry.path / "current").exists(), "looking at a store writes nothing"


def test_without_current_and_without_an_intact_generation_all_problems_are_named(tmp_path: Path) -> None:
    entry, first = committed(tmp_path)
    fill(entry, "g0002", "second")
    second = entry.commit("g0002", BODY)
    (entry.path / "current").unlink()
    (first.path / "weights.bin").unlink()
    (second.path / MANIFEST).write_text("{")
    damage = str(entry.damage())
    assert damage.startswith(f"{entry.path / 'current'}: missing")
    assert f"{first.path / 'weights.bin'} is missing" in damage
    assert Store(tmp_path).generations("pretrain") == []
    fill(entry, "g0003", "third")
    assert entry.commit("g0003", BODY).id == current(entry).id and entry.damage() is None


def test_a_directory_in_the_place_of_current_is_damage_until_the_next_commit(tmp_path: Path) -> None:
    entry, _ = committed(tmp_path)
    (entry.path / "current").unlink()
    (entry.path / "current" / "below").mkdir(parents=True)
    assert str(entry.path / "current") in str(entry.damage())
    fill(entry, "g0002", "second")
    assert entry.commit("g0002", BODY).id == current(entry).id and entry.damage() is None


def test_an_entry_never_executed_is_neither_stored_nor_damaged(tmp_path: Path) -> None:
    entry = Store(tmp_path).entry("pretrain", PRINT)
    assert entry.current() is None and entry.damage() is None and entry.next_generation() == "g0001"


# ---- scratch


def test_scratch_survives_as_long_as_the_inputs_are_the_same(tmp_path: Path) -> None:
    entry = entry_in(tmp_path)
    scratch = entry.open_scratch({"tokenize": "g1", "pretrain": "g2"}, fresh=False)
    for name in ("checkpoint", "stop", "progress.json"):
        (scratch / name).write_text("x")
    assert entry.open_scratch({"pretrain": "g2", "tokenize": "g1"}, fresh=False) == scratch
    assert {p.name for p in scratch.iterdir()} == {"checkpoint", "inputs.json"}, "a stop request is not inherited"


@pytest.mark.parametrize(("inputs", "fresh"), [({"tokenize": "g2"}, False), ({}, False), ({"tokenize": "g1"}, True)])
def test_scratch_of_other_inputs_or_of_a_forced_run_is_emptied(
    tmp_path: Path, inputs: dict[str, str], fresh: bool
) -> None:
    entry = entry_in(tmp_path)
    scratch = entry.open_scratch({"tokenize": "g1"}, fresh=False)
    (scratch / "checkpoint").write_text("x")
    entry.open_scratch(inputs, fresh=fresh)
    assert not (scratch / "checkpoint").exists()


def test_scratch_whose_inputs_are_unknown_is_emptied(tmp_path: Path) -> None:
    entry = entry_in(tmp_path)
    entry.scratch.mkdir()
    (entry.scratch / "checkpoint").write_text("x")
    assert not (entry.open_scratch({}, fresh=False) / "checkpoint").exists()


# ---- reading many


def test_generations_come_oldest_first_and_unreadable_entries_are_passed_over(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, created in enumerate(["2026-03-01", "2026-01-01", "2026-02-01"]):
        entry = store.entry("pretrain", str(number) * 64)
        fill(entry, "g0001", "x")
        entry.commit("g0001", BODY | {"created": created})
    (store.entry("pretrain", "0" * 64).path / "g0001" / MANIFEST).write_text("[]")
    (tmp_path / "store" / "pretrain" / "a file").write_text("x")
    assert [g.manifest["created"] for g in store.generations("pretrain")] == ["2026-01-01", "2026-02-01"]
