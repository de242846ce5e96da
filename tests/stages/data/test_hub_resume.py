"""A hub dataset whose copy was interrupted goes on behind its last whole part, to the same bytes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lazypipe.stages.data.hub as hub
from lazypipe.stages.contract import Context, Interrupted
from lazypipe.stages.data.hub import copy_to_parquet
from lazypipe.stages.data.sources import HubSource
from tests.stages.tokenization.test_stage import story


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> tuple[Path, list[str | None]]:
    """Three files of 100 rows, copied in parts of about 20 rows."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "_PART_BYTES", 4000)
    monkeypatch.setattr(hub, "_ROW_GROUP_BYTES", 1500)
    texts = [None if i % 17 == 3 else story(i) for i in range(300)]
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(3):
        table = pa.table({"text": texts[100 * shard : 100 * shard + 100]})
        pq.write_table(table, folder / f"train-{shard:05d}-of-00003.parquet", row_group_size=30)
    return folder, texts


def copy(source: HubSource, scratch: Path) -> list[Path]:
    scratch.mkdir(exist_ok=True)
    return [Path(file.path) for file in copy_to_parquet(source, Context(scratch, scratch))]


def rows(files: list[Path]) -> list[str | None]:
    return [text for file in files for text in pq.read_table(file).column("text").to_pylist()]


def content(scratch: Path) -> dict[str, bytes]:
    return {str(file.relative_to(scratch)): file.read_bytes() for file in sorted(scratch.rglob("text.parquet"))}


@pytest.mark.parametrize("take", [None, 250])
@pytest.mark.parametrize("streaming", [True, False])
def test_an_interrupted_copy_goes_on_behind_its_last_part(tmp_path, monkeypatch, dataset, streaming, take):
    folder, texts = dataset
    source = HubSource(kind="hub", dataset=str(folder), streaming=streaming, max_documents=take)
    undisturbed = copy(source, tmp_path / "whole")
    assert rows(undisturbed) == texts[:take]
    assert len(undisturbed) > 10

    real, read = hub._text, []
    failing = True

    def text(share, row, number):
        read.append(row["text"])
        if failing and len(read) == 130:
            raise ConnectionResetError("the hub went away")
        return real(share, row, number)

    monkeypatch.setattr(hub, "_text", text)
    scratch = tmp_path / "broken"
    with pytest.raises(ConnectionResetError):
        copy(source, scratch)
    whole_parts = len(list(scratch.rglob("part-*/manifest.json")))
    assert whole_parts >= 4
    failing, before = False, len(read)
    files = copy(source, scratch)
    assert rows(files) == texts[:take]
    assert content(scratch) == content(tmp_path / "whole")
    again = len(read) - before
    assert again <= len(texts[:take]) - 130 + 25, "only the part that was cut off is read again"


def test_a_damaged_part_and_what_follows_is_copied_again(tmp_path, dataset):
    folder, texts = dataset
    source = HubSource(kind="hub", dataset=str(folder), streaming=True, max_documents=200)
    files = copy(source, tmp_path / "scratch")
    expected = content(tmp_path / "scratch")
    files[3].write_bytes(files[3].read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"part-00003.*copied again, with what follows"):
        assert rows(copy(source, tmp_path / "scratch")) == texts[:200]
    assert content(tmp_path / "scratch") == expected


def test_a_stop_ends_the_copy_after_the_part_in_hand(tmp_path, dataset):
    folder, texts = dataset
    source = HubSource(kind="hub", dataset=str(folder), streaming=True, max_documents=200)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "stop").touch()
    with pytest.raises(Interrupted, match=r"2\d rows \(0 of 1 shares whole\) are kept, and the next run goes on"):
        copy(source, scratch)
    (scratch / "stop").unlink()
    assert rows(copy(source, scratch)) == texts[:200]
