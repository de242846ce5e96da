"""The loops of `lazypipe bench tokenize` do the same work, and the watch sees memory."""

import json
from pathlib import Path

import numpy as np
import pytest

from lazypipe.pipeline.bench.memory_watch import MemoryWatch
from lazypipe.pipeline.bench.tokenization import parse
from lazypipe.pipeline.bench.tokenization_loops import Ours, documents, encode_raw, write_corpus
from lazypipe.stages.contract import UserError
from lazypipe.stages.tokenization.tokenizer import train_tokenizer


def test_ours_and_the_raw_encoder_make_the_same_number_of_tokens(tmp_path):
    corpus, tokenizer = tmp_path / "corpus.jsonl", tmp_path / "tokenizer.json"
    size = write_corpus(corpus, 0.4)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert sum(len(text.encode()) for text in texts) == size >= 400_000
    assert len(set(texts)) == len(texts)
    train_tokenizer(documents()[:20], 400).save(str(tokenizer))
    ours = Ours(corpus, tokenizer, tmp_path, map, processes=1)
    tokens, seconds = ours.encode()
    assert seconds > 0
    assert len(ours.corpus.units) == 8
    for shares, threads in ((1, 2), (2, 1)):
        counts = [encode_raw(str(corpus), str(tokenizer), share, shares, threads)[0] for share in range(shares)]
        assert sum(counts) == tokens


def test_the_watch_sees_what_was_held_for_a_moment():
    watch = MemoryWatch()
    with watch:
        held = np.ones(200_000_000, dtype=np.uint8)
        del held
    assert watch.peaks()["driver_mb"] > 200 > watch.peaks()["worker_mb"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--memory", "5", "0.5"], "--memory 0.5: must be at least 1"),
        (["--json", "/nowhere/a.json"], "/nowhere is no folder"),
    ],
)
def test_mistakes_on_the_command_line_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        parse(arguments)
    assert parse(["--json", str(Path("a.json"))]).repeats == 5
