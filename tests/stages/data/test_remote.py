"""Files behind URIs: the same corpus as the same files on disk, and copies that can be trusted."""

import gzip
import json
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

import lazypipe.stages.data.remote as remote
import lazypipe.stages.data.source_files as source_files
from lazypipe.stages.contract import UserError, file_sha256
from lazypipe.stages.data.sources import FilesSource
from lazypipe.stages.tokenization.config import TokenizeConfig
from lazypipe.stages.tokenization.identity import check_source, corpus_fingerprint, source_identity
from lazypipe.stages.tokenization.upload import check_target, copy_corpus
from tests.stages.tokenization.test_stage import content, story, tokenize


def write_files(folder: Path) -> None:
    (folder / "deep/er").mkdir(parents=True)
    texts = [story(i) for i in range(40)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a file.txt").write_text(texts[0])
    (folder / "deep/b.jsonl").write_text("".join(lines[1:20]))
    with gzip.open(folder / "deep/er/c.jsonl.gz", "wt") as file:
        file.write("".join(lines[20:30]))
    pq.write_table(pa.table({"text": texts[30:]}), folder / "deep/er/d.parquet", row_group_size=3)
    (folder / "deep/.hidden.txt").write_text("not this")


@pytest.fixture(params=["file", "bucket"])
def base(request, tmp_path, monkeypatch) -> str:
    """The URI of a folder: real file://, and a file system that knows buckets and no local paths."""
    folder = tmp_path / "remote" / "bucket"
    folder.mkdir(parents=True)
    write_files(folder)
    if request.param == "file":
        return f"file://{folder}"
    real = remote.filesystem_of
    below = pyarrow.fs.SubTreeFileSystem(str(folder.parent), pyarrow.fs.LocalFileSystem())

    def filesystem_of(uri: str, key: str | None = None):
        if not uri.startswith("s3://"):
            return real(uri, key)
        return below, unquote(uri.removeprefix("s3://").split("?")[0])

    for module in ("lazypipe.stages.data.remote", "lazypipe.stages.tokenization.upload"):
        monkeypatch.setattr(f"{module}.filesystem_of", filesystem_of)
    return "s3://bucket"


def source(*paths: str) -> dict:
    return {"kind": "files", "paths": list(paths)}


def test_a_remote_corpus_is_the_local_one(tmp_path, base):
    local = tmp_path / "remote/bucket"
    here = source(str(local / "a file.txt"), str(local / "deep/**/*.jsonl*"), str(local / "deep/er/d.parquet"))
    there = source(f"{base}/a%20file.txt", f"{base}/deep/**/*.jsonl*", f"{base}/deep/er/d.parquet")
    config = TokenizeConfig.model_validate({"source": there}).source
    assert isinstance(config, FilesSource)
    names = [remote.file_name(f.path) for f in source_files.source_files(config)]
    assert names == ["a file.txt", "b.jsonl", "c.jsonl.gz", "d.parquet"]
    for shard_bytes in (2**26, 4096):
        expected, output = tokenize(tmp_path / f"here-{shard_bytes}", here, shard_bytes=shard_bytes)
        found, remote_output = tokenize(tmp_path / f"there-{shard_bytes}", there, shard_bytes=shard_bytes)
        assert content(remote_output) == content(output)
        assert found == expected
    configs = [TokenizeConfig(source=s) for s in (here, there)]
    identities = [source_identity(config, None) for config in configs]
    assert identities[0] == identities[1], "a recipe knows contents, not places"
    assert len({corpus_fingerprint(c, i) for c, i in zip(configs, identities, strict=True)}) == 1
    assert check_source(configs[1], None).files == 4


def test_a_remote_file_is_hashed_once(tmp_path, base, monkeypatch):
    config = TokenizeConfig(source=source(f"{base}/deep/*.jsonl"))
    first = source_identity(config, tmp_path)
    assert f"{base}/deep/b.jsonl" in json.loads((tmp_path / source_files.HASH_CACHE).read_text())
    monkeypatch.setattr(source_files, "_measure", None)
    assert source_identity(config, tmp_path) == first
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nothing.txt", r"source.paths: '.*nothing.txt' does not exist; correct it"),
        ("deep", r"'.*deep' is a folder; name its files with a glob such as .*deep/\*.jsonl"),
        ("deep/*.txt", r"the glob '.*deep/\*.txt' matches none of the 4 files below '.*deep'"),
        ("nowhere/*.txt", r"there is no folder '.*nowhere'"),
        ("deep/er/*.gz", None),
    ],
)
def test_what_is_not_there_is_refused_by_name(base, path, said):
    config = TokenizeConfig(source=source(f"{base}/{path}"))
    if said is None:
        assert check_source(config, None).files == 1
        return
    with pytest.raises(UserError, match=said):
        check_source(config, None)


def test_uris_that_mean_nothing_or_hold_a_secret():
    with pytest.raises(
        UserError, match=r"source.paths: 'ftp://host/a.txt' cannot be opened: .*Known are local paths, file://, s3://"
    ):
        check_source(TokenizeConfig(source=source("ftp://host/a.txt")), None)
    with pytest.raises(UserError, match=r"source.paths: 's3://...@bucket/a.txt' holds a password") as error:
        check_source(TokenizeConfig(source=source("s3://key:secret@bucket/a.txt")), None)
    assert "secret@" not in str(error.value)
    with pytest.raises(ValidationError, match="copy_to=/data is not a URI; give one such as"):
        TokenizeConfig(copy_to="/data")


def test_a_bucket_that_does_not_answer_is_named_as_the_user_wrote_it(monkeypatch):
    def silent(*_):
        raise OSError("AWS Error NETWORK_CONNECTION during HeadBucket operation")

    monkeypatch.setattr("lazypipe.stages.data.remote.filesystem_of", silent)
    said = r"source.paths: 's3://bucket/x/\*.txt' cannot be reached: AWS Error NETWORK_CONNECTION.*credentials"
    with pytest.raises(UserError, match=said):
        check_source(TokenizeConfig(source=source("s3://bucket/x/*.txt")), None)


def committed(folder: Path) -> Path:
    """What a generation looks like: files, and a manifest with their hashes."""
    files = {"train/shard-00000.arrow": b"a" * 1000, "train/docs.arrow": b"b" * 10, "tokenizer/tokenizer.json": b"{}"}
    listed = {}
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        listed[name] = {"size": len(data), "sha256": file_sha256(path)}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))
    return folder


def test_a_copy_is_whole_and_nothing_is_sent_twice(tmp_path, base):
    generation, uri = committed(tmp_path / "g0001"), f"{base}/copies/one"
    target = tmp_path / "remote/bucket/copies/one"
    target.mkdir(parents=True)
    check_target(uri)
    assert list(target.iterdir()) == []
    first = copy_corpus(generation, uri)
    assert (first.files, first.bytes, first.present) == (3, 1012, 0)
    for file in generation.rglob("*.*"):
        assert (target / file.relative_to(generation)).read_bytes() == file.read_bytes()
    assert copy_corpus(generation, uri).files == 0
    # A copy that did not finish: no manifest, one file missing, one cut short, one with other bytes of the same size.
    (target / "manifest.json").unlink()
    (target / "train/docs.arrow").unlink()
    (target / "tokenizer/tokenizer.json").write_bytes(b"[]")
    again = copy_corpus(generation, uri)
    assert (again.files, again.present) == (2, 1)
    assert (target / "tokenizer/tokenizer.json").read_bytes() == b"{}"
    assert (target / "manifest.json").read_bytes() == (generation / "manifest.json").read_bytes()
    # Another corpus in the same place: a manifest that is no longer true goes first.
    (generation / "train/docs.arrow").write_bytes(b"c" * 10)
    listed = json.loads((generation / "manifest.json").read_text())
    listed["files"]["train/docs.arrow"]["sha256"] = file_sha256(generation / "train/docs.arrow")
    (generation / "manifest.json").write_text(json.dumps(listed))
    assert copy_corpus(generation, uri).files == 1
    assert (target / "train/docs.arrow").read_bytes() == b"c" * 10


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"tokenize.copy_to: 'file://.*file/x' cannot be reached"):
        check_target(f"file://{tmp_path}/file/x")
