"""A committed corpus copied to a remote folder through pyarrow's filesystems: `tokenize.copy_to`.

    <URI>/tokenizer/tokenizer.json   train/shard-00000.arrow ...   manifest.json      (the generation's own, last)

A folder without a manifest is a copy that did not finish. What is there already with the right size and sha256 is not
sent again: a manifest beside it that names the same hash is believed, without one the remote file is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import UserError, first_line
from lazypipe.stages.data.remote import filesystem_of, unreachable
from lazypipe.stages.tokenization.config import TokenizeConfig

_KEY = "tokenize.copy_to"
_MANIFEST = "manifest.json"
_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class Copied:
    """Files and bytes sent, and files that were there already."""

    files: int
    bytes: int
    present: int


def check_publish(config: TokenizeConfig) -> None:
    """Refuse a `copy_to` that cannot be written, before anything is computed."""
    if config.copy_to is not None:
        check_target(config.copy_to)


def publish(config: TokenizeConfig, generation: Path) -> str | None:
    """Copy a stored corpus to `copy_to`, also one stored before the field was set; a line that says what was sent."""
    if config.copy_to is None:
        return None
    copied = copy_corpus(generation, config.copy_to)
    sent = f"{copied.files} files, {copied.bytes / 1e6:.1f} MB sent"
    return f"copied to {config.copy_to}: {sent}, {copied.present} were there already"


def check_target(uri: str) -> None:
    """Refuse, before anything is computed, a folder that cannot be written: a small file is put there and removed."""
    try:
        filesystem, folder = filesystem_of(uri, _KEY)
        probe = f"{folder}/.lazypipe-{secrets.token_hex(4)}"
        _make_folder(filesystem, folder)
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"may this be written?")
        filesystem.delete_file(probe)
    except OSError as error:
        raise UserError(unreachable(uri, _KEY, error)) from None


def copy_corpus(generation: Path, uri: str, report: Callable[[int, int], None] | None = None) -> Copied:
    """Copy the files that generation/manifest.json lists to `uri`, the manifest last. report(bytes done, of all).

    UserError when the file system answers with an error: the corpus is committed, and another run copies the rest.
    """
    filesystem, folder = filesystem_of(uri, _KEY)
    text = (generation / _MANIFEST).read_bytes()
    files: dict[str, dict[str, Any]] = json.loads(text)["files"]
    sent = size = done = present = 0
    total = sum(entry["size"] for entry in files.values())
    try:
        _make_folder(filesystem, folder)
        there = _stored_manifest(filesystem, folder)
        if there == text:
            return Copied(0, 0, len(files))
        known = _hashes(there)
        for name, entry in files.items():
            target = f"{folder}/{name}"
            if _is_there(filesystem, target, entry, known.get(name)):
                present += 1
            else:
                if there is not None:  # it will not be true of what is here from now on
                    filesystem.delete_file(f"{folder}/{_MANIFEST}")
                    there = None
                _make_folder(filesystem, target.rpartition("/")[0])
                _send(filesystem, generation / name, target)
                sent += 1
                size += entry["size"]
            done += entry["size"]
            if report is not None:
                report(done, total)
        with filesystem.open_output_stream(f"{folder}/{_MANIFEST}") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(
            f"{_KEY}: the copy to {uri!r} stopped after {sent} files: {first_line(error)}. The corpus is stored; run "
            "again to send the rest"
        ) from error
    return Copied(sent, size, present)


def _is_there(filesystem: Any, target: str, entry: Mapping[str, Any], known: str | None) -> bool:
    info = filesystem.get_file_info(target)
    if not info.is_file or info.size != entry["size"]:
        return False
    if known is None:
        with filesystem.open_input_stream(target) as stream:
            known = _sha256(stream)
    return bool(known == entry["sha256"])


def _sha256(stream: Any) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _send(filesystem: Any, source: Path, target: str) -> None:
    with source.open("rb") as file, filesystem.open_output_stream(target) as stream:
        while chunk := file.read(_CHUNK):
            stream.write(chunk)


def _stored_manifest(filesystem: Any, folder: str) -> bytes | None:
    path = f"{folder}/{_MANIFEST}"
    if not filesystem.get_file_info(path).is_file:
        return None
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def _hashes(manifest: bytes | None) -> dict[str, str]:
    """sha256 by file name of an earlier copy's manifest; nothing where there is none or it cannot be read."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        return {name: entry["sha256"] for name, entry in json.loads(manifest or b"")["files"].items()}
    return {}


def _make_folder(filesystem: Any, folder: str) -> None:
    """Object stores have no folders, and a bucket is not ours to make."""
    if filesystem.type_name not in ("s3", "gcs"):
        filesystem.create_dir(folder, recursive=True)
