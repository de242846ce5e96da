"""Files behind a URI (s3://, gs://, hdfs://, file:// and whatever else pyarrow.fs knows), read in place.

A local path is a Path and a remote file a str: its URI. Imports pyarrow only when there is a URI to open, so that
planning on local files stays instant. Credentials are the file system's own business: the usual environment variables
and files, or the URI's query (s3://bucket/path?region=eu-west-1&endpoint_override=...).
"""

from __future__ import annotations

import fnmatch
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote, unquote

from lazypipe.stages.contract import UserError, first_line

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_REMOTE_BUFFER = 4 * 2**20
_SECRET = re.compile(r"://[^/?@]*:[^/?]*@")
_MAGIC = re.compile(r"[*\[]")  # not the question mark: in a URI it begins the query


def is_uri(name: str) -> bool:
    return _URI.match(name) is not None


def open_binary(file: Path | str) -> IO[bytes]:
    """A local file or a URI, opened for reading and seeking. OSError when it cannot be."""
    if isinstance(file, Path):
        return file.open("rb")
    # pyarrow's own file has no readline, and asks the server anew for every read.
    return io.BufferedReader(open_arrow(file), _REMOTE_BUFFER)


def open_arrow(file: Path | str) -> Any:
    """The same as a pyarrow NativeFile, for pyarrow's readers. OSError when it cannot be opened."""
    if isinstance(file, Path):
        import pyarrow as pa

        return pa.OSFile(str(file))
    filesystem, path = filesystem_of(file)
    return filesystem.open_input_file(path)


def size_and_mtime(file: Path | str) -> tuple[int, int]:
    """Bytes, and nanoseconds since the epoch (0 where the file system keeps no time)."""
    if isinstance(file, Path):
        status = file.stat()
        return status.st_size, status.st_mtime_ns
    filesystem, path = filesystem_of(file)
    info = filesystem.get_file_info(path)
    return int(info.size or 0), int(info.mtime_ns or 0)


def file_name(file: Path | str) -> str:
    """The last part of a path or URI, without the query."""
    return file.name if isinstance(file, Path) else unquote(file.split("?", 1)[0]).rsplit("/", 1)[-1]


def filesystem_of(uri: str, key: str | None = None) -> tuple[Any, str]:
    """(pyarrow file system, path in it). UserError, naming field `key`, for a URI that holds a password, is malformed
    or of a scheme that pyarrow does not know; OSError when a file system is asked on the way and does not answer.
    """
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    field = "" if key is None else f"{key}: "
    if _SECRET.search(uri):
        raise UserError(
            f"{field}{_SECRET.sub('://...@', uri)!r} holds a password, and experiment files are stored and logged; "
            "leave it out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what the file system reads"
        )
    try:
        return cast("tuple[Any, str]", FileSystem.from_uri(uri))
    except (ArrowException, ValueError) as error:
        raise UserError(
            f"{field}{uri!r} cannot be opened: {first_line(error)}. Known are local paths, file://, s3:// and gs:// "
            "(as s3://BUCKET/PATH), and what else pyarrow.fs.FileSystem.from_uri takes"
        ) from None


def matching(pattern: str, key: str) -> list[str]:
    """URIs of the files that a URI or a glob over its path (*, [...], ** for any depth) names, sorted.

    UserError, naming `key`, when there is none or the file system does not let us look.
    """
    address, mark, query = pattern.partition("?")
    end = f"{mark}{query}"
    magic = _MAGIC.search(address, len(cast("re.Match[str]", _URI.match(address)).group()))
    if magic is None:
        info = _look(pattern, key, pattern)[0]
        if not info.is_file:
            what = "is a folder; name its files with a glob such as" if info.type.name == "Directory" else ""
            hint = f"{what} {address.rstrip('/')}/*.jsonl" if what else "does not exist; correct it"
            raise UserError(f"{key}: {pattern!r} {hint}")
        return [pattern]
    folder, relative = address[: magic.start()].rpartition("/")[0], address[: magic.start()].rpartition("/")[2]
    relative += address[magic.start() :]
    root, listed = _look(folder + end, key, pattern, below=True)
    if root.type.name == "NotFound":
        raise UserError(f"{key}: {pattern!r}: there is no folder {folder!r}; correct it")
    wanted = [unquote(part) for part in relative.split("/")]
    base = root.path.rstrip("/") + "/"
    names = sorted(info.path.removeprefix(base) for info in listed if info.is_file)
    found = [name for name in names if _fits(name.split("/"), wanted)]
    if not found:
        raise UserError(
            f"{key}: the glob {pattern!r} matches none of the {len(names)} files below {folder!r}; correct it"
        )
    return [f"{folder}/{quote(name)}{end}" for name in found]


def _look(uri: str, key: str, pattern: str, below: bool = False) -> tuple[Any, list[Any]]:
    """(what is at a URI, all that is below it if asked); `pattern` is what the user wrote."""
    from pyarrow.fs import FileSelector

    try:
        filesystem, path = filesystem_of(uri, key)
        info = filesystem.get_file_info(path)
        listed = filesystem.get_file_info(FileSelector(path, recursive=True, allow_not_found=True)) if below else []
    except OSError as error:
        raise UserError(unreachable(pattern, key, error)) from None
    return info, listed


def unreachable(uri: str, key: str, error: Exception) -> str:
    """One sentence for a file system that answers with an error."""
    return (
        f"{key}: {uri!r} cannot be reached: {first_line(error)}. Check the bucket's name, the network and the "
        "credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS)"
    )


def _fits(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob, as glob.glob(recursive=True) does: no hidden files."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        deeper = bool(name) and not name[0].startswith(".") and _fits(name[1:], pattern)
        return _fits(name, pattern[1:]) or deeper
    if not name or (name[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(name[0], pattern[0]) and _fits(name[1:], pattern[1:])
