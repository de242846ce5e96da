"""Token shards against the array they were written from."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazypipe.stages.data.shards import DOCUMENTS_SCHEMA, ShardWriter, TokenShards, shard_name, write_documents


def write_split(directory: Path, tokens: np.ndarray, dtype: str, shard_bytes: int, step: int) -> list[Path]:
    writer = ShardWriter(directory, "shard", dtype, shard_bytes)
    for start in range(0, len(tokens), step):
        writer.append(tokens[start : start + step])
    paths = writer.close()
    rows = {"start": [0], "length": [len(tokens)], "source_row": [7], "bytes": [1]}
    write_documents(directory / "docs.arrow", [pa.table(rows, schema=DOCUMENTS_SCHEMA)])
    return paths


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 9000),
    st.sampled_from(["uint16", "uint32"]),
    st.sampled_from([4096, 5000, 12_288]),
    st.integers(1, 3000),
    st.integers(0, 2**32 - 1),
)
def test_any_window_is_the_slice_of_what_was_written(count, dtype, shard_bytes, step, seed):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, np.iinfo(dtype).max, count, endpoint=True)
    with tempfile.TemporaryDirectory() as directory:
        paths = write_split(Path(directory), tokens, dtype, shard_bytes, step)
        shards = TokenShards(Path(directory))
        assert shards.num_tokens == count
        for start, stop in np.sort(random.integers(0, count + 1, (20, 2)), axis=1):
            window = shards.read(int(start), int(stop - start))
            assert window.dtype == np.int64
            np.testing.assert_array_equal(window, tokens[start:stop])
        for path in paths:
            with pa.memory_map(str(path)) as source:
                reader = pa.ipc.open_file(source)
                lengths = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
            assert all(length == lengths[0] and length & (length - 1) == 0 for length in lengths[:-1])
            assert lengths[-1] <= lengths[0]
            assert sum(lengths) * np.dtype(dtype).itemsize <= shard_bytes
        assert sorted(path.name for path in paths) == [shard_name(i) for i in range(len(paths))]
        assert not list(Path(directory).glob(".*"))  # no temporary file is left


def test_reading_copies_nothing_into_arrow_memory(tmp_path):
    write_split(tmp_path, np.arange(60_000), "uint16", 2**20, 60_000)
    before = pa.total_allocated_bytes()
    shards = TokenShards(tmp_path)
    shards.read(12_345, 4096)
    assert pa.total_allocated_bytes() == before
    assert shards.documents.to_pylist() == [{"start": 0, "length": 60_000, "source_row": 7, "bytes": 1}]


def test_shards_keep_no_file_descriptor_open(tmp_path):
    write_split(tmp_path, np.arange(60_000), "uint16", 4096, 60_000)
    before = len(list(Path("/proc/self/fd").iterdir()))
    shards = TokenShards(tmp_path)
    assert len(list(tmp_path.glob("shard-*"))) > 20
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert shards.read(59_999, 1)[0] == 59_999


def test_shards_are_joined_by_number_not_by_spelling(tmp_path):
    for name, token in (("shard-99999.arrow", 1), ("shard-100000.arrow", 2)):
        (path,) = write_split(tmp_path / "one", np.array([token]), "uint16", 4096, 1)
        path.rename(tmp_path / name)
    (tmp_path / "one" / "docs.arrow").rename(tmp_path / "docs.arrow")
    assert TokenShards(tmp_path).read(0, 2).tolist() == [1, 2]


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 11), (10, 1), (3, -1)])
def test_tokens_outside_are_an_error(tmp_path, start, length):
    write_split(tmp_path, np.arange(10), "uint16", 4096, 10)
    with pytest.raises(IndexError, match="holds 10"):
        TokenShards(tmp_path).read(start, length)


def test_a_directory_without_shards_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        TokenShards(tmp_path)
