"""Token shards: what tokenization writes and training reads.

    <split>/shard-00000.arrow ...   one uint16 or uint32 column "token", all shards in order = the split's token stream
    <split>/docs.arrow              one row per document: where it lies in that stream and where it came from

A shard is an uncompressed Arrow IPC file, memory-mapped on read: a window is one copy out of the page cache and no
decoding (Parquet in its place gave 6.6 random documents per second against 10^5 windows). Its record batches all have
the same power-of-two length except the last, so the batch that holds a token is found by one binary search.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

# 2 MiB of uint16: large enough that opening 20 GB of shards builds 10^4 views and not 10^6, small enough to buffer.
PIECE_TOKENS = 2**20  # 8 MiB as int64
MAX_BATCH_TOKENS = 2**20

DOCUMENTS_FILE = "docs.arrow"
DOCUMENTS_SCHEMA = pa.schema(
    [
        pa.field("start", pa.int64(), nullable=False),  # position of the document's first token in the split
        pa.field("length", pa.int64(), nullable=False),  # tokens, the EOS at its end included
        pa.field("source_row", pa.int64(), nullable=False),  # row in the source, skipped rows counted too
        pa.field("bytes", pa.int64(), nullable=False),  # UTF-8 bytes of the text, without the EOS
    ]
)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.arrow"


class TokenShards:
    """The token stream of one split, read through memory maps.

    num_tokens: tokens in all shards. documents: pyarrow table with the columns of DOCUMENTS_SCHEMA.
    Raises FileNotFoundError when the directory holds no shard.
    """

    def __init__(self, split_dir: Path) -> None:
        # By length first: shard 100000 comes after shard 99999.
        paths = sorted(split_dir.glob("shard-*.arrow"), key=lambda path: (len(path.name), path.name))
        if not paths:
            raise FileNotFoundError(f"{split_dir} holds no token shard (shard-*.arrow)")
        self.split_dir = split_dir
        self._chunks: list[npt.NDArray[Any]] = [array for path in paths for array in _token_arrays(path)]
        # starts[i] = position of the first token of chunk i; one more entry at the end, the number of tokens.
        self._starts = np.concatenate([[0], np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)])
        self.num_tokens = int(self._starts[-1])
        self.documents: pa.Table = _read_mapped(split_dir / DOCUMENTS_FILE)

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """tokens[start : start + length] as int64 [length]; crosses batch and shard borders. IndexError outside."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(
                f"tokens {start}..{start + length} were asked of {self.split_dir}, which holds {self.num_tokens}"
            )
        out = np.empty(length, dtype=np.int64)
        filled = 0
        chunk = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < length:
            offset = start + filled - int(self._starts[chunk])
            piece = self._chunks[chunk][offset : offset + length - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            chunk += 1
        return out

    def pieces(self) -> Iterator[npt.NDArray[np.int64]]:
        """All tokens in order, PIECE_TOKENS at a time (the last piece is shorter), int64."""
        for start in range(0, self.num_tokens, PIECE_TOKENS):
            yield self.read(start, min(PIECE_TOKENS, self.num_tokens - start))


class ShardWriter:
    """Writes a token stream as shards `<stem>-00000.arrow`, ... of at most about `shard_bytes` each.

    Memory is one record batch. A shard appears under its name only when it is complete.
    """

    def __init__(self, directory: Path, stem: str, dtype: str, shard_bytes: int) -> None:
        self.directory = directory
        self.stem = stem
        self.num_tokens = 0
        self.shards: list[Path] = []
        self._schema = pa.schema([pa.field("token", pa.from_numpy_dtype(np.dtype(dtype)), nullable=False)])
        shard_tokens = max(1, shard_bytes // np.dtype(dtype).itemsize)
        batch_tokens = min(MAX_BATCH_TOKENS, 2 ** (shard_tokens.bit_length() - 1))
        self._batches_per_shard = shard_tokens // batch_tokens
        self._buffer = np.empty(batch_tokens, dtype=dtype)
        self._filled = 0
        self._batches = 0
        self._writer: Any = None
        directory.mkdir(parents=True, exist_ok=True)

    def append(self, tokens: npt.NDArray[Any]) -> None:
        """Append token ids [n] of any integer dtype; the caller has checked that they fit."""
        self.num_tokens += len(tokens)
        while len(tokens):
            taken = tokens[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            tokens = tokens[len(taken) :]
            if self._filled == len(self._buffer):
                self._write_batch()

    def close(self) -> list[Path]:
        """Finish the last shard and return the paths of all, in order. No token, no shard."""
        if self._filled:
            self._write_batch()
        if self._writer is not None:
            self._finish_shard()
        return self.shards

    def _write_batch(self) -> None:
        if self._writer is None:
            self._writer = pa.ipc.new_file(_temporary(self._next_path()), self._schema)
        column = pa.array(self._buffer[: self._filled])
        self._writer.write_batch(pa.record_batch([column], schema=self._schema))
        self._filled = 0
        self._batches += 1
        if self._batches == self._batches_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        path = self._next_path()
        self._writer.close()
        self._writer = None
        self._batches = 0
        _temporary(path).replace(path)
        self.shards.append(path)

    def _next_path(self) -> Path:
        return self.directory / f"{self.stem}-{len(self.shards):05d}.arrow"


def write_documents(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write document rows (columns of DOCUMENTS_SCHEMA) to one Arrow IPC file, table by table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_file(_temporary(path), DOCUMENTS_SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)
    _temporary(path).replace(path)


def read_documents(path: Path) -> pa.Table:
    """The document rows of one file, memory-mapped."""
    return _read_mapped(path)


def _token_arrays(path: Path) -> list[npt.NDArray[Any]]:
    table = _read_mapped(path)
    return [chunk.to_numpy(zero_copy_only=True) for chunk in table.column("token").chunks if len(chunk)]


def _read_mapped(path: Path) -> pa.Table:
    # Closing the file gives its descriptor back; the mapping lives as long as an array that points into it. Keeping
    # them open would end at the usual limit of 1024 descriptors, about 40 GB of shards.
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
