"""The tokenize stage as a whole, on small corpora, against documents encoded one by one."""

import hashlib
import json
import math
import multiprocessing
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

import lazypipe.stages.tokenization.documents as documents
from lazypipe.stages.contract import Context, Interrupted, Outputs, UserError, map_serially
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.tokenization.config import TokenizeConfig
from lazypipe.stages.tokenization.stage import run

WORDS = ["the", "winter", "of", "our", "discontent", "made", "glorious", "summer", "by", "this", "sun", "of", "York"]


def story(number: int, words: int = 40) -> str:
    random = np.random.default_rng(number)
    return f"Story {number}.\n" + " ".join(random.choice(WORDS, words)) + "\n"


def tokenize(folder: Path, source: dict, map_function=map_serially, **fields) -> tuple[Outputs, Path]:
    context = Context(folder / "output", folder / "scratch", map_function=map_function)
    for directory in (context.output_dir, context.scratch_dir):
        directory.mkdir(parents=True)
    fields = {"tokenizer": {"kind": "train", "vocab_size": 300}, **fields}
    return run(TokenizeConfig(source=source, **fields), {}, context), context.output_dir


def decoded(output: Path, split: str) -> list[str]:
    """Texts of a split, through the document table; checks that each ends with EOS and that they fill the stream."""
    shards, tokenizer = TokenShards(output / split), Tokenizer.from_file(str(output / "tokenizer/tokenizer.json"))
    texts, position = [], 0
    for row in shards.documents.to_pylist():
        assert row["start"] == position
        ids = shards.read(row["start"], row["length"]).tolist()
        position += row["length"]
        assert ids[-1] == 0
        assert 0 not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1], skip_special_tokens=False))
        assert row["bytes"] == len(texts[-1].encode())
    assert position == shards.num_tokens
    return texts


def write_mixed_corpus(folder: Path) -> tuple[dict, list[str]]:
    """txt, jsonl, jsonl.gz-free and Parquet files with empty rows and copies; returns source and documents in order."""
    texts = [story(i) for i in range(30)]
    texts[7] = texts[21] = texts[3]  # copies
    rows = [*texts[10:20], "", None, " \n"]
    (folder / "a.txt").write_text("<|>".join(texts[:10]), newline="")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in rows))
    pq.write_table(pa.table({"text": [None, *texts[20:]]}), folder / "c.parquet", row_group_size=4)
    paths = [str(folder / name) for name in ("a.txt", "b.jsonl", "c.parquet")]
    return {"kind": "files", "paths": paths, "document_separator": "<|>"}, texts


def test_every_document_is_in_one_split_and_decodes_to_itself(tmp_path):
    source, texts = write_mixed_corpus(tmp_path)
    outputs, output = tokenize(tmp_path, source, validation_fraction=0.2)
    ordered = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out: set[str] = set()
    while sum(len(text.encode()) for text in texts if text in held_out) < 0.2 * sum(len(t.encode()) for t in texts):
        held_out.add(ordered[len(held_out)])
    expected = {
        "train": [text for text in texts if text not in held_out],
        "validation": [text for text in texts if text in held_out],
    }
    for split, wanted in expected.items():
        assert decoded(output, split) == wanted
        facts = outputs.facts.splits[split]
        assert facts.documents == len(wanted) == outputs.metrics[f"{split}_documents"]
        assert facts.bytes == sum(len(text.encode()) for text in wanted)
        assert facts.tokens == TokenShards(output / split).num_tokens
        assert facts.shards == sorted(path.name for path in (output / split).glob("shard-*"))
    assert outputs.facts.source.documents == 30
    assert outputs.facts.source.skipped_rows == 4
    assert not list(output.rglob(".*"))
    rows = {row["file"]: row for row in json.loads((output / "tables/sources.json").read_text())}
    assert [(row["first_row"], row["rows"], row["documents"]) for row in rows.values()] == [
        (0, 10, 10), (10, 13, 10), (23, 11, 10),
    ]  # fmt: skip
    source_rows = sorted(
        row for split in expected for row in TokenShards(output / split).documents.column("source_row").to_pylist()
    )
    assert source_rows == [*range(20), *range(24, 34)]


def test_statistics_match_a_recount(tmp_path):
    source, _ = write_mixed_corpus(tmp_path)
    outputs, output = tokenize(tmp_path, source)
    train = TokenShards(output / "train")
    counts = Counter(train.read(0, train.num_tokens).tolist())
    entropy = -sum(n / train.num_tokens * math.log(n / train.num_tokens) for n in counts.values())
    metrics = outputs.metrics
    assert metrics["unigram_entropy"] == pytest.approx(entropy, rel=1e-12)
    text_bytes = metrics["train_bytes"] + metrics["validation_bytes"]
    assert metrics["bytes_per_token"] == text_bytes / (metrics["train_tokens"] + metrics["validation_tokens"])
    histogram = outputs.facts.document_length_histogram
    assert json.loads((output / "tables/document_lengths.json").read_text()) == histogram
    for split in ("train", "validation"):
        lengths = TokenShards(output / split).documents.column("length").to_pylist()
        for row in histogram:
            assert row[f"{split}_documents"] == sum(row["from_tokens"] <= n <= row["to_tokens"] for n in lengths)
        assert sum(row[f"{split}_documents"] for row in histogram) == len(lengths)
    assert (output / "figures/document_lengths.png").stat().st_size > 5000
    progress = json.loads((tmp_path / "scratch/progress.json").read_text())
    assert progress["done"] == progress["total"] == text_bytes
    assert progress["unit"] == "bytes"
    assert {"mb_per_s", "tokens_per_s"} <= set(progress["numbers"])
    json.dumps(outputs.facts.to_json())


def test_tokenizer_sees_training_documents_only(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": chr(945 + i) * 400}) + "\n" for i in range(20)))
    outputs, output = tokenize(
        tmp_path, {"kind": "files", "paths": [str(tmp_path / "a.jsonl")]}, validation_fraction=0.3
    )
    letters = {split: {text[0] for text in decoded(output, split)} for split in ("train", "validation")}
    tokenizer = Tokenizer.from_file(str(output / "tokenizer/tokenizer.json"))
    assert outputs.facts.vocab_size == 300
    # A letter of two bytes becomes one token only if it was seen in training.
    for split, at_most in (("train", 1), ("validation", 2)):
        assert {len(tokenizer.encode(letter).ids) for letter in letters[split]} == {at_most}


def content(output: Path) -> dict[str, object]:
    splits = {split: TokenShards(output / split) for split in ("train", "validation")}
    return {
        "tokenizer": (output / "tokenizer/tokenizer.json").read_text(),
        **{
            name: (shards.read(0, shards.num_tokens).tolist(), shards.documents.to_pylist())
            for name, shards in splits.items()
        },
    }


def test_tokens_do_not_depend_on_workers_parts_or_shards(tmp_path):
    source, _ = write_mixed_corpus(tmp_path)
    one, output = tokenize(tmp_path / "serial", source)  # one unit
    expected = content(output)
    small = {"shard_bytes": 4096}
    assert one.facts.source.bytes > 4096  # several units
    serial, output = tokenize(tmp_path / "small", source, **small)
    assert content(output) == expected
    shards = {path.name: path.read_bytes() for path in sorted(output.rglob("*.arrow"))}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["lazypipe.stages.tokenization.encode", "tokenizers"])
    for workers in (2, 4):
        with ProcessPoolExecutor(workers, mp_context=processes) as pool:
            spread, output = tokenize(tmp_path / f"workers-{workers}", source, pool.map, **small)
        assert {path.name: path.read_bytes() for path in sorted(output.rglob("*.arrow"))} == shards
        assert spread == serial
    assert one.metrics == serial.metrics


@pytest.mark.parametrize("separator", [None, "@@"])
def test_a_long_document_is_encoded_in_pieces_with_the_tokens_of_the_whole(tmp_path, monkeypatch, separator):
    text = "".join(story(i) for i in range(60))
    (tmp_path / "a.txt").write_text(text + (f"{separator}short" if separator else ""))
    source = {"kind": "files", "paths": [str(tmp_path / "a.txt")], "document_separator": separator}
    _, whole = tokenize(tmp_path / "whole", source)
    monkeypatch.setattr(documents.read_pieces, "__defaults__", (500,))
    _, pieces = tokenize(tmp_path / "pieces", source)
    assert content(pieces) == content(whole)
    assert "".join(decoded(pieces, "train") + decoded(pieces, "validation")).replace("short", "") == text


def test_a_single_document_is_cut_at_a_line_near_its_tail(tmp_path):
    text = "".join(story(i, words=10) for i in range(50))
    (tmp_path / "a.txt").write_text(text)
    outputs, output = tokenize(tmp_path, {"kind": "files", "paths": [str(tmp_path / "a.txt")]}, validation_fraction=0.1)
    (train,), (validation,) = decoded(output, "train"), decoded(output, "validation")
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.1 * len(text) <= len(validation) <= 0.2 * len(text)
    assert outputs.metrics["validation_bytes"] == len(validation)


@pytest.mark.parametrize("large_first", [True, False])
def test_one_document_with_most_of_the_bytes(tmp_path, large_first):
    def digest(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    small = story(0)
    large = next(text for i in range(99) if (digest(text := story(i, 3000)) < digest(small)) == large_first)
    (tmp_path / "a.txt").write_text(f"{small}@@{large}")
    source = {"kind": "files", "paths": [str(tmp_path / "a.txt")], "document_separator": "@@"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, output = tokenize(tmp_path, source)
    assert decoded(output, "validation") == [large if large_first else small]
    assert decoded(output, "train") == [small if large_first else large]
    assert any("held out for validation" in str(warning.message) for warning in caught) == large_first


def test_crlf_and_byte_order_mark(tmp_path):
    (tmp_path / "a file.txt").write_bytes(b"\xef\xbb\xbfline one\r\nline two\r\n" * 1 + b"more words\r\n" * 20)
    _, output = tokenize(tmp_path, {"kind": "files", "paths": [str(tmp_path / "a file.txt")]})
    text = "".join(decoded(output, "train") + decoded(output, "validation"))
    assert text == "line one\r\nline two\r\n" + "more words\r\n" * 20


def test_invalid_utf8_is_replaced_counted_and_named(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.jsonl"
    good.write_text(story(1))
    bad.write_bytes(b'{"text": "caf\xe9 au lait, na\xefve \xff\xfe words"}\n')
    source = {"kind": "files", "paths": [str(good), str(bad)]}
    with pytest.warns(UserWarning, match=r"bad.jsonl: 4 bytes are not UTF-8"):
        outputs, output = tokenize(tmp_path / "replace", source)
    assert outputs.facts.invalid_utf8_bytes == 4
    assert "caf� au lait, na�ve �� words" in decoded(output, "train") + decoded(output, "validation")
    with pytest.raises(UserError, match=r"bad.jsonl' is not UTF-8 at byte 13"):
        tokenize(tmp_path / "refuse", source, invalid_utf8="refuse")


def test_invalid_utf8_inside_parquet_is_refused_by_option(tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"fine", b"caf\xe9"], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet' holds bytes that are not UTF-8"):
        tokenize(tmp_path, {"kind": "files", "paths": [str(tmp_path / "a.parquet")]}, invalid_utf8="refuse")


def test_eos_spelt_out_in_a_text_is_text_and_a_warning(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(story(i) for i in range(9)))
    source = {"kind": "files", "paths": [str(tmp_path / "a.txt")]}
    with pytest.warns(UserWarning, match=r"spells out .* <\|endoftext\|> 8 times.*document_separator"):
        _, output = tokenize(tmp_path / "plain", source)
    assert "".join(decoded(output, "train") + decoded(output, "validation")).count("<|endoftext|>") == 8
    outputs, _ = tokenize(tmp_path / "split", {**source, "document_separator": "<|endoftext|>"})
    assert outputs.facts.source.documents == 9


@pytest.mark.parametrize("rows", ['{"text": ""}\n{"text": null}\n', '{"text": " "}\n' * 30])
def test_rows_without_text_are_an_empty_corpus(tmp_path, rows):
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(UserError, match="corpus is empty"):
        tokenize(tmp_path, {"kind": "files", "paths": [str(tmp_path / "a.jsonl")]})


def test_a_tokenizer_file_brings_its_eos_and_dtype(tmp_path):
    tokenizer = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
                "decoder": {"type": "Fuse"}, "pre_tokenizer": None,
                "added_tokens": [{"id": 70_000, "content": "</s>", "single_word": False, "lstrip": False,
                                  "rstrip": False, "normalized": False, "special": True}],
                "model": {"type": "BPE", "merges": [],
                          "vocab": {**{chr(i): i for i in range(10, 127)}, "</s>": 70_000}},
            }
        )
    )  # fmt: skip
    path = tmp_path / "mine.json"
    tokenizer.save(str(path))
    (tmp_path / "a.txt").write_text(story(1))
    source = {"kind": "files", "paths": [str(tmp_path / "a.txt")]}
    outputs, output = tokenize(
        tmp_path / "run", source, tokenizer={"kind": "file", "path": str(path)}, token_dtype="uint32"
    )
    facts = outputs.facts
    assert (facts.eos_token, facts.eos_id, facts.vocab_size) == ("</s>", 70_000, 70_001)
    train = TokenShards(output / "train")
    tokens = train.read(0, train.num_tokens)
    assert tokens[-1] == 70_000
    assert "".join(map(chr, tokens[:-1])) == story(1)[: len(tokens) - 1]
    with pytest.raises(UserError, match="more than token_dtype=uint16"):
        tokenize(tmp_path / "small", source, tokenizer={"kind": "file", "path": str(path)})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_directory_is_a_hub_dataset(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [story(i) for i in range(24)]
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(3):
        rows = {"id": list(range(8)), "text": texts[8 * shard : 8 * shard + 8]}
        pq.write_table(pa.table(rows), folder / f"train-{shard:05d}-of-00003.parquet")
    source = {"kind": "hub", "dataset": str(folder), "streaming": streaming}
    outputs, output = tokenize(tmp_path / "all", source)
    assert sorted(decoded(output, "train") + decoded(output, "validation")) == sorted(texts)
    assert outputs.facts.source.documents == 24
    assert len(list((tmp_path / "all/scratch").rglob("text.parquet"))) == (3 if streaming else 1)
    _, output = tokenize(tmp_path / "some", {**source, "max_documents": 10})
    assert sorted(decoded(output, "train") + decoded(output, "validation")) == sorted(texts[:10])
    with pytest.raises(UserError, match=r"lacks the text column 'txt'; it has 'id', 'text'; did you mean 'text'"):
        tokenize(tmp_path / "column", {**source, "text_column": "txt"})
    with pytest.raises(UserError, match=r"column 'id' holds '0' \(int\), expected text"):
        tokenize(tmp_path / "number", {**source, "text_column": "id"})
    with pytest.raises(UserError, match=r"split 'nope'.*could not be loaded"):
        tokenize(tmp_path / "split", {**source, "split": "nope"})


@pytest.mark.parametrize("shard_bytes", [4096, 2**26])
def test_a_request_to_stop_ends_the_stage(tmp_path, shard_bytes):
    source, _ = write_mixed_corpus(tmp_path)
    (tmp_path / "scratch").mkdir()
    context = Context(tmp_path / "output", tmp_path / "scratch")
    context.output_dir.mkdir()
    (context.scratch_dir / "stop").touch()
    config = TokenizeConfig(source=source, tokenizer={"kind": "train", "vocab_size": 300}, shard_bytes=shard_bytes)
    with pytest.raises(Interrupted, match="tokenization stopped"):
        run(config, {}, context)
