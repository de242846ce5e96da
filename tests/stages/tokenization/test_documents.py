"""Documents read in pieces against the same documents read at once."""

import gzip
import io
import json
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazypipe.stages.contract import UserError
from lazypipe.stages.data.rows import decode_utf8
from lazypipe.stages.data.source_files import SourceFile
from lazypipe.stages.tokenization.documents import Layout, cut_into_pieces, plan_units, read_pieces, split_text
from lazypipe.stages.tokenization.tokenizer import train_tokenizer

TEXT = Layout()
WORDS = st.text(st.sampled_from("ab1 .\n\r\té日<|>"), max_size=60)


def documents(path: Path, layout: Layout = TEXT, unit_bytes: int = 10**9, piece_bytes: int = 2**20) -> list[str]:
    name = path.name.removesuffix(".gz")
    kinds: dict[str, Literal["text", "jsonl", "parquet"]] = {"txt": "text", "jsonl": "jsonl", "parquet": "parquet"}
    file = SourceFile(path, kinds[name.rsplit(".", 1)[1]], path.name.endswith(".gz"))
    found, text = [], ""
    for unit in plan_units([(file, path.stat().st_size)], layout, unit_bytes):
        for part in unit:
            for piece in read_pieces(part, layout, piece_bytes):
                text += piece.text
                if piece.ends_document:
                    found.append(text)
                    text = ""
    assert text == ""
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(WORDS, st.integers(3, 20))
def test_pieces_join_to_the_document_and_are_bounded(text, piece_bytes):
    pieces = list(cut_into_pieces(text.encode(), piece_bytes))
    assert b"".join(piece for piece, _ in pieces).decode() == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(piece) <= piece_bytes for piece, _ in pieces[:-1])
    assert all(piece.decode() is not None for piece, _ in pieces)  # no character is cut


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(WORDS, max_size=6), st.sampled_from(["<|>", "\n\n", "aa", ""]), st.integers(3, 30), st.integers(1, 40))
def test_a_stream_is_split_like_its_whole_text_whatever_the_chunks(texts, separator, piece_bytes, chunk):
    text = separator.join(texts)
    stream = io.BytesIO(text.encode())
    documents, document = [], []
    for piece, last in split_text(lambda _: stream.read(chunk), separator.encode(), piece_bytes):
        document.append(piece)
        if last:
            documents.append(document)
            document = []
    expected = text.split(separator) if separator else [text]
    if len(expected) > 1 and not expected[-1]:
        expected.pop()
    assert [[piece.decode() for piece in pieces] for pieces in documents] == [
        [piece.decode() for piece, _ in cut_into_pieces(one.encode(), piece_bytes)] for one in expected
    ]


def test_pieces_have_the_tokens_of_the_whole_document():
    text = "\n\n".join(f"**Speaker {i}**  \nWhat's 12 {'word ' * (i % 7)}; it's\r\n  done: é日 !?" for i in range(300))
    tokenizer = train_tokenizer([text], 400)
    whole = tokenizer.encode(text).ids
    for piece_bytes in (40, 333, 5000):
        pieces = [piece.decode() for piece, _ in cut_into_pieces(text.encode(), piece_bytes)]
        assert len(pieces) > 2
        assert [i for piece in pieces for i in tokenizer.encode(piece).ids] == whole


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=30))
def test_invalid_bytes_are_replaced_and_counted(data):
    text, invalid = decode_utf8(data)
    assert text == data.decode(errors="replace")
    # Brute force: bytes of the maximal valid runs, found character by character.
    valid, position = 0, 0
    while position < len(data):
        for width in (1, 2, 3, 4):
            try:
                data[position : position + width].decode()
            except UnicodeDecodeError:
                continue
            valid += len(data[position : position + width])
            position += width
            break
        else:
            position += 1
    assert invalid == len(data) - valid


@pytest.mark.parametrize("unit_bytes", [1, 7, 30, 10**6])
def test_jsonl_is_the_same_in_any_number_of_parts(tmp_path, unit_bytes):
    texts = ["one", "", None, "zwei\nZeilen", "日本", "x" * 50]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode() + b"\n   \n")
    assert documents(path, unit_bytes=unit_bytes) == [text or "" for text in texts]


def test_gzip_and_parquet_hold_the_same_documents(tmp_path):
    texts = ["one", "", None, "two\r\nlines", "日本"]
    (tmp_path / "rows.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps({"body": text}).encode() + b"\n" for text in texts))
    )
    layout = Layout(text_column="body")
    kinds = {"string": pa.string(), "large": pa.large_string(), "bytes": pa.binary()}
    kinds["dictionary"] = pa.dictionary(pa.int32(), pa.string())
    expected = [text or "" for text in texts]
    assert documents(tmp_path / "rows.jsonl.gz", layout) == expected
    for name, kind in kinds.items():
        column = pa.array([None if text is None else text.encode() for text in texts], pa.binary())
        column = column.cast(pa.string()).cast(kind)
        pq.write_table(pa.table({"n": range(5), "body": column}), tmp_path / f"{name}.parquet", row_group_size=2)
        assert documents(tmp_path / f"{name}.parquet", layout, unit_bytes=1) == expected


@pytest.mark.parametrize("name", ["a b.txt", "a.txt.gz"])
def test_text_files_keep_every_character_but_the_byte_order_mark(tmp_path, name):
    text = "  line\r\nline \n\n"
    data = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert documents(tmp_path / name) == [text]
    assert documents(tmp_path / name, Layout(document_separator="\r\n")) == ["  line", "line \n\n"]
    assert documents(tmp_path / name, Layout(document_separator="\n\n")) == ["  line\r\nline "]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"rows.jsonl:4 is not a JSON object"),
        ("[1]", r"rows.jsonl:4 is not a JSON object but '\[1\]'"),
        ('{"txt": "a", "id": 1}', r"rows.jsonl:4 lacks the text column 'text'; it has 'txt', 'id'.*did you mean 'txt'"),
        ('{"text": 12}', r"rows.jsonl:4: column 'text' holds '12' \(int\), expected text"),
    ],
)
@pytest.mark.parametrize("unit_bytes", [10, 10**6])
def test_a_bad_line_is_named(tmp_path, line, message, unit_bytes):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        documents(path, unit_bytes=unit_bytes)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    assert documents(path) == ["a���b"]
