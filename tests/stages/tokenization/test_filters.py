"""Documents left out: counted, and the same ones for any layout of the files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazypipe.stages.config import identity
from lazypipe.stages.contract import UserError
from lazypipe.stages.tokenization.config import Filters, TokenizeConfig
from lazypipe.stages.tokenization.filters import DUPLICATE, KEPT, TOO_SHORT, filter_documents
from lazypipe.stages.tokenization.split import DIGEST_DTYPE
from tests.stages.tokenization.test_stage import content, decoded, story, tokenize


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.text("aé ", max_size=4), min_size=1, max_size=12), st.integers(0, 4), st.sampled_from(["keep", "drop"])
)
def test_filters_are_what_a_loop_over_documents_does(texts, min_chars, duplicates):
    import hashlib

    digests = np.array([hashlib.sha256(t.encode()).digest() for t in texts], DIGEST_DTYPE)
    sizes = np.array([len(t.encode()) if t.strip() else 0 for t in texts])
    seen: set[str] = set()
    expected = []
    for text in texts:
        short = bool(text.strip()) and len(text) < min_chars
        copy = bool(text.strip()) and not short and duplicates == "drop" and text in seen
        expected.append(TOO_SHORT if short else DUPLICATE if copy else KEPT)
        seen.add(text)
    config = Filters(min_chars=min_chars, exact_duplicates=duplicates)
    if sizes.any() and all(reason != KEPT or not t.strip() for t, reason in zip(texts, expected, strict=True)):
        with pytest.raises(UserError, match=r"filters.min_chars=\d: all \d+ documents are shorter"):
            filter_documents(config, digests, sizes, np.array([len(t) for t in texts]))
        return
    found = filter_documents(config, digests, sizes, np.array([len(t) for t in texts]))
    assert found.reasons.tolist() == expected
    assert found.sizes.tolist() == [s if r == KEPT else 0 for s, r in zip(sizes, expected, strict=True)]


def write(folder: Path, texts: list[str]) -> dict[str, Any]:
    for name, rows in (("a", texts[:20]), ("b", texts[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return {"kind": "files", "paths": [str(folder / "a.jsonl"), str(folder / "b.jsonl")]}


def test_what_is_left_out_is_counted_and_nothing_else_changes(tmp_path):
    texts = [story(number) for number in range(40)]
    texts[5] = "résumé"  # 6 characters, 8 bytes
    texts[9], texts[30], texts[31] = texts[2], texts[3], texts[3]
    source = write(tmp_path, texts)
    filters = {"min_chars": 7, "exact_duplicates": "drop"}
    outputs, output = tokenize(tmp_path / "filtered", source, filters=filters, validation_fraction=0.3)
    left = list(dict.fromkeys(text for text in texts if len(text) >= 7))
    train, validation = decoded(output, "train"), decoded(output, "validation")
    assert sorted(train + validation) == sorted(left)
    assert not set(train) & set(validation)
    assert [text for text in left if text in set(train)] == train, "input order"
    size = {number: len(texts[number].encode()) for number in (5, 9, 30, 31)}
    assert outputs.facts.to_json()["filters"] == {
        "too_short": {"documents": 1, "bytes": 8},
        "duplicate": {"documents": 3, "bytes": size[9] + size[30] + size[31]},
    }
    assert outputs.metrics["duplicate_documents"] == 3
    assert outputs.facts.source.documents == 40
    assert outputs.facts.source.bytes == sum(len(text.encode()) for text in texts)
    rows = json.loads((output / "tables/sources.json").read_text())
    assert [(row["too_short_documents"], row["duplicate_documents"], row["duplicate_bytes"]) for row in rows] == [
        (1, 1, size[9]),
        (0, 2, size[30] + size[31]),
    ]
    # The same as if they had never been there.
    (tmp_path / "clean").mkdir()
    _, clean = tokenize(tmp_path / "clean-run", write(tmp_path / "clean", left), validation_fraction=0.3)
    filtered, expected = content(output), content(clean)
    for split in ("train", "validation"):
        assert filtered[split][0] == expected[split][0], split
    small, in_units = tokenize(tmp_path / "units", source, filters=filters, validation_fraction=0.3, shard_bytes=4096)
    assert content(in_units) == filtered
    assert small.facts.filters == outputs.facts.filters


def test_one_text_many_times_is_one_document_cut_near_its_end(tmp_path):
    outputs, output = tokenize(tmp_path, write(tmp_path, [story(1)] * 30), filters={"exact_duplicates": "drop"})
    assert "".join(decoded(output, "train") + decoded(output, "validation")) == story(1)
    assert outputs.facts.filters["duplicate"].documents == 29


def test_the_defaults_are_not_part_of_a_recipe():
    assert identity(TokenizeConfig()) == {}
    assert identity(TokenizeConfig(filters={"min_chars": 5})) == {"filters": {"min_chars": 5}}
