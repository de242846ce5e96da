"""Held-out loss and bytes against sums by hand, and what the stage refuses and leaves alone."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.model.loss import next_token_loss
from lazypipe.stages.contract import Artifact, Interrupted, Outputs, UserError
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate import perplexity
from lazypipe.stages.evaluate import stage as evaluate
from lazypipe.stages.evaluate.config import PROBES, EvaluateConfig
from lazypipe.stages.evaluate.token_bytes import byte_scale, token_byte_counts
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.pretrain import stage as pretrain
from tests.stages.made_facts import pretrain_facts
from tests.stages.pretrain.toy_training import context_in, tiny_run

SEQ_LEN, MAX_SEQ_LEN = 32, 64
MIXERS = ("standard", "lazy")  # tests/stages/pretrain/test_mechanisms.py decodes with them all


@pytest.fixture(scope="module", params=MIXERS)
def trained(request: pytest.FixtureRequest, corpus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    directory = tmp_path_factory.mktemp(request.param)
    outputs = pretrain.run(tiny_run(request.param, steps=30), {"tokenize": corpus}, context_in(directory))
    return Artifact(directory / "output", {"facts": outputs.facts.to_json(), "metrics": outputs.metrics})


def config_of(**fields: Any) -> EvaluateConfig:
    defaults = {"extrapolation": {"context_lengths": [16, 32, 128]}, "prompts": ["the king", ""], "max_new_tokens": 6}
    return EvaluateConfig.model_validate({**defaults, "max_tokens": 1000, **fields})


def evaluated(corpus: Artifact, trained: Artifact, directory: Path, **fields: Any) -> Outputs:
    return evaluate.run(config_of(**fields), {"tokenize": corpus, "pretrain": trained}, context_in(directory))


def rows(directory: Path, table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(directory / "output" / "tables" / f"{table}.parquet").to_pylist()
    return found


def test_every_number_against_a_sum_by_hand(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    """All validation windows, one at a time, in float64 from the logits; bytes from decoding each window's tokens."""
    from tokenizers import Tokenizer

    outputs = evaluated(corpus, trained, tmp_path, max_tokens=10**6)
    model = load_checkpoint(trained.path / "checkpoint").model
    tokenizer = Tokenizer.from_file(str(corpus.path / "tokenizer" / "tokenizer.json"))
    shards = TokenShards(corpus.path / "validation")
    table = {row["context_length"]: row for row in rows(tmp_path, "context_lengths")}
    assert list(table) == [16, 32, 128]
    for length, row in table.items():
        windows = (shards.num_tokens - 1) // length
        nats, text_bytes = 0.0, 0
        for window in range(windows):
            tokens = torch.from_numpy(shards.read(window * length, length + 1))
            with torch.no_grad():
                log_probs = torch.log_softmax(model(tokens[None, :-1])[0].double(), dim=-1)
            nats -= float(log_probs[torch.arange(length), tokens[1:]].sum())
            text_bytes += len(tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=True).encode())
        assert (row["windows"], row["tokens"]) == (windows, windows * length)
        assert row["extrapolation"] == (length > MAX_SEQ_LEN)
        assert row["loss"] == pytest.approx(nats / (windows * length), rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
        assert outputs.metrics[f"perplexity_at/{length}"] == row["perplexity"]
    trained_length = table[SEQ_LEN]
    assert outputs.metrics["validation_loss"] == trained_length["loss"]
    assert outputs.metrics["perplexity"] == trained_length["perplexity"]
    assert outputs.metrics["bits_per_byte"] == trained_length["bits_per_byte"]
    assert outputs.facts.byte_scale == 1.0
    assert (outputs.facts.max_seq_len, outputs.facts.seq_len) == (MAX_SEQ_LEN, SEQ_LEN)


def test_results_do_not_depend_on_the_batch_size(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    one, many = (
        evaluated(corpus, trained, tmp_path / str(batch), batch_tokens=batch).metrics for batch in (1, 100_000)
    )
    assert one.keys() == many.keys()
    for name, value in one.items():
        assert value == pytest.approx(many[name], rel=1e-5), name


def test_no_more_than_batch_tokens_pass_through_the_model_at_once(
    corpus: Artifact, trained: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    honest = next_token_loss

    def watched(model: Any, windows: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(windows[:, 1:].numel())
        return honest(model, windows, *others)

    monkeypatch.setattr(perplexity, "next_token_loss", watched)
    evaluated(corpus, trained, tmp_path, batch_tokens=200, max_tokens=500)
    assert max(sizes) <= 200
    assert sum(sizes) == 31 * 16 + 15 * 32 + 3 * 128


def test_continuations(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    evaluated(corpus, trained, tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
    found = rows(tmp_path / "a", "continuations")
    methods = [(row["prompt"], row["method"]) for row in found]
    assert methods == [("the king", "greedy"), ("the king", "sampled"), ("", "greedy"), ("", "sampled")]
    assert all(row["text"] for row in found)
    assert not any("<|endoftext|>" in row["text"] or row["text"].startswith("the king") for row in found[:2])

    # One at a time, or with another seed: greedy text stays, sampled text follows the seed alone.
    evaluated(corpus, trained, tmp_path / "b", prompts=[""])
    assert rows(tmp_path / "b", "continuations") == found[2:]
    evaluated(corpus, trained, tmp_path / "c", seed=1, max_new_tokens=24)
    evaluated(corpus, trained, tmp_path / "d", seed=2, max_new_tokens=24)
    one, two = (rows(tmp_path / name, "continuations") for name in "cd")
    assert [row["text"] for row in one if row["method"] == "greedy"] == [
        row["text"] for row in two if row["method"] == "greedy"
    ]
    assert one != two


def test_a_length_without_a_window_is_refused_by_name_before_compute(corpus: Artifact, tmp_path: Path) -> None:
    trained = Artifact(tmp_path / "absent", {"facts": pretrain_facts(seq_len=SEQ_LEN), "metrics": {}})
    tokens = TokenizeFacts.read(corpus.manifest).splits["validation"].tokens
    for length in (tokens, 10 * tokens):
        with pytest.raises(UserError, match=rf"context_lengths holds {length}, .* has {tokens} tokens"):
            evaluated(corpus, trained, tmp_path, extrapolation={"context_lengths": [16, length]})


def test_the_longest_window_that_fits_is_scored(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    length = TokenizeFacts.read(corpus.manifest).splits["validation"].tokens - 1
    evaluated(corpus, trained, tmp_path, extrapolation={"context_lengths": [length]})
    assert [(row["windows"], row["tokens"]) for row in rows(tmp_path, "context_lengths")] == [(1, length)]


def test_a_stop_is_heeded(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    context = context_in(tmp_path)
    (context.scratch_dir / "stop").touch()
    with pytest.raises(Interrupted, match="stopped after 0 of"):
        evaluate.run(config_of(), {"tokenize": corpus, "pretrain": trained}, context)


def test_extrapolation_and_probes_beside_the_rest(corpus: Artifact, trained: Artifact, tmp_path: Path) -> None:
    """They change no other number, and windows side by side over the same tokens are those spread over the split."""
    tokens = TokenizeFacts.read(corpus.manifest).splits["validation"].tokens
    length = next(n for n in range(20, 200) if (tokens - 1) % n == 0)
    plain = evaluated(
        corpus, trained, tmp_path / "plain", extrapolation={"context_lengths": [length]}, max_tokens=10**6
    )
    assert not (tmp_path / "plain" / "output" / "figures").exists()
    more = {
        "extrapolation": {"context_lengths": [length], "same_tokens": 10**6},
        "probes": {"lengths": [64], "sequences": 2, "depths": [0.5], "segment_tokens": 8},
    }
    both = evaluated(corpus, trained, tmp_path / "both", max_tokens=10**6, **more)
    assert {name: both.metrics[name] for name in plain.metrics} == plain.metrics
    for table in ("context_lengths", "continuations"):
        assert rows(tmp_path / "plain", table) == rows(tmp_path / "both", table)
    found = {row["context_length"]: row for row in rows(tmp_path / "both", "extrapolation")}
    old = rows(tmp_path / "both", "context_lengths")[0]
    assert found[length]["tokens"] == old["tokens"] == tokens - 1
    assert found[length]["loss"] == pytest.approx(old["loss"], rel=1e-6)
    assert {row["probe"] for row in rows(tmp_path / "both", "probes")} == {"recall", "needle", "induction", "copy"}
    assert set(both.metrics) - set(plain.metrics) == {
        f"extrapolation/{length}",
        *(f"probe/{name}/{what}_beyond" for name in PROBES for what in ("accuracy", "gain")),
    }


def test_probes_that_want_more_tokens_than_there_are_are_refused(corpus: Artifact, tmp_path: Path) -> None:
    trained = Artifact(tmp_path / "absent", {"facts": pretrain_facts(seq_len=SEQ_LEN), "metrics": {}})
    with pytest.raises(UserError, match=r"recall takes 301 different tokens \(pairs=100.* ask for less"):
        evaluated(corpus, trained, tmp_path, probes={"lengths": [400], "pairs": 100})


def tokenizer_file(directory: Path, kind: str) -> Path:
    """A tokenizer trained on TEXT: byte-level, SentencePiece-like with byte fallback, or one that lower-cases."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "pieces", unk_token="<unk>" if kind == "pieces" else None))
    special = ["<eos>", "<unk>"]
    alphabet = []
    if kind == "pieces":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "stripping":
        tokenizer.normalizer = normalizers.Replace("e", "")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special[:2],
        initial_alphabet=alphabet,
        limit_alphabet=15 if kind == "pieces" else 256,  # leaves rare characters to the byte tokens
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if kind == "pieces":  # the byte tokens are ordinary tokens of the vocabulary, as in a converted SentencePiece model
        model = json.loads(tokenizer.to_str())
        for token in special[2:]:
            model["model"]["vocab"][token] = len(model["model"]["vocab"])
        tokenizer = Tokenizer.from_str(json.dumps(model))
    path = directory / f"{kind}.json"
    tokenizer.save(str(path))
    return path


TEXT = "the wind and the whale, naïve café — 鯨 and 🐳; the end of the tale. " * 3


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_byte_table_is_exact(tmp_path: Path, kind: str) -> None:
    from tokenizers import Tokenizer

    path = tokenizer_file(tmp_path, kind)
    tokenizer = Tokenizer.from_file(str(path))
    counts = token_byte_counts(path, tokenizer.get_vocab_size() + 3)
    ids = tokenizer.encode(TEXT).ids
    assert tokenizer.decode(ids) == TEXT
    assert counts[ids].sum() == len(TEXT.encode())
    assert counts[tokenizer.token_to_id("<eos>")] == 0
    assert counts[-3:].tolist() == [0, 0, 0]
    if kind == "pieces":
        assert any(tokenizer.id_to_token(i).startswith("<0x") for i in ids)


def test_a_tokenizer_that_loses_text_is_scaled_to_the_bytes_of_the_split(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from lazypipe.stages.data.shards import ShardWriter, write_documents

    path = tokenizer_file(tmp_path, "stripping")
    ids = Tokenizer.from_file(str(path)).encode(TEXT).ids
    writer = ShardWriter(tmp_path / "split", "shard", "uint16", 2**20)
    writer.append(np.array(ids))
    writer.close()
    write_documents(tmp_path / "split" / "docs.arrow", [])
    counts = token_byte_counts(path, 600)
    scale = byte_scale(counts, TokenShards(tmp_path / "split"), len(TEXT.encode()))
    assert scale == pytest.approx(len(TEXT.encode()) / (len(TEXT.encode()) - TEXT.count("e")))
    assert counts[ids].sum() * scale == pytest.approx(len(TEXT.encode()))
