"""Windows and position buckets against models whose loss at every position is known, and against evaluate's windows."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lazypipe.model import scoring
from lazypipe.model.scoring import token_losses
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Interrupted
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate import length_extrapolation
from lazypipe.stages.evaluate.config import ExtrapolationConfig
from lazypipe.stages.evaluate.length_extrapolation import bucket_ends, windows
from tests.model.tiny_model import VOCAB, awake, some_tokens, tiny
from tests.stages.evaluate.language_models import ByPosition, Uniform
from tests.stages.tiny_experiment import context_in, tokenized

CPU = torch.device("cpu")


def counting_shards(directory: Path, tokens: int, vocab_size: int) -> TokenShards:
    """0, 1, 2, ... (mod V): the text that ByPosition's rule predicts."""
    from lazypipe.stages.data.shards import ShardWriter, write_documents

    writer = ShardWriter(directory / "validation", "shard", "uint16", shard_bytes=2**20)
    writer.append(np.arange(tokens) % vocab_size)
    writer.close()
    write_documents(directory / "validation" / "docs.arrow", [])
    return TokenShards(directory / "validation")


def measured(
    directory: Path, model: Any, shards: TokenShards, batch_tokens: int = 500, same_tokens: int = 65_536, **fields: Any
) -> dict[str, Any]:
    context = context_in(directory)
    config = ExtrapolationConfig.model_validate({"same_tokens": same_tokens, **fields})
    metrics = length_extrapolation.measure(config, same_tokens, model, shards, 16, batch_tokens, CPU, context)
    tables = context.output_dir / "tables"
    found = {name: json.loads((tables / f"{name}.json").read_text()) for name in ("extrapolation", "positions")}
    assert (context.output_dir / "figures" / "extrapolation.png").stat().st_size > 10_000
    return {"metrics": metrics, **found}


def test_every_prediction_is_scored_once_with_at_least_the_context_the_stride_leaves() -> None:
    for predictions in (10, 11, 29, 30, 31, 64):
        for length in (1, 2, 7, 10):
            for stride in {1, 2, 3, 7, length}:
                if stride > length:
                    continue
                scored = []
                for window in windows(predictions, length, stride):
                    ends = range(window.start + window.first_scored, window.start + length + 1)
                    scored += list(ends)
                    assert window.start >= 0 and ends[-1] <= predictions
                    assert window.start == 0 or window.first_scored > length - stride
                assert scored == list(range(1, predictions + 1)), (predictions, length, stride)


def test_a_uniform_model_has_the_vocabulary_as_perplexity_everywhere(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path / "corpus", 301, 50)
    found = measured(tmp_path, Uniform(50), shards, context_lengths=[8, 16, 40], stride=5)
    assert found["metrics"].keys() == {
        *(f"extrapolation/{length}" for length in (8, 16, 40)),
        *(f"extrapolation_sliding/{length}" for length in (8, 16, 40)),
    }
    for value in found["metrics"].values():
        assert value == pytest.approx(50, rel=1e-6)
    assert [row["tokens"] for row in found["extrapolation"]] == [300] * 6
    assert [row["extrapolation"] for row in found["extrapolation"]] == [False, False, False, False, True, True]
    assert all(row["loss_error"] == pytest.approx(0, abs=1e-4) for row in found["extrapolation"])


def test_position_buckets_hold_exactly_the_losses_of_their_positions(tmp_path: Path) -> None:
    """At position p the model gives the right token 1 / (1 + p), so its loss there is log(1 + p)."""
    vocab, length = 50, 40
    shards = counting_shards(tmp_path / "corpus", 4 * length + 1, vocab)
    found = measured(tmp_path, ByPosition(vocab), shards, context_lengths=[length, 8])
    rows = [row for row in found["positions"] if row["context_length"] == length]
    edges = [(row["first_position"], row["last_position"]) for row in rows]
    assert edges == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 40)]
    for row in rows:
        positions = range(row["first_position"], row["last_position"] + 1)
        expected = [math.log(1 + position) for position in positions]
        assert row["tokens"] == 4 * len(positions)
        assert row["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
        error = np.std(expected * 4, ddof=1) / (4 * len(positions)) ** 0.5
        assert row["loss_error"] == pytest.approx(error, rel=1e-4, abs=1e-4)
    whole = math.exp(np.mean([math.log(1 + position) for position in range(1, length + 1)]))
    assert found["metrics"][f"extrapolation/{length}"] == pytest.approx(whole, rel=1e-5)


def test_sliding_windows_score_their_last_positions(tmp_path: Path) -> None:
    """8 + 3 + 3 + 3 + 3 + 1 predictions: the first window whole, then positions 6 to 8, at last position 8 alone."""
    shards = counting_shards(tmp_path / "corpus", 22, 50)
    found = measured(tmp_path, ByPosition(50), shards, context_lengths=[8], stride=3, same_tokens=21)
    sliding = next(row for row in found["extrapolation"] if row["stride"] == 3)
    losses = [math.log(1 + p) for p in (*range(1, 9), *(6, 7, 8) * 4, 8)]
    assert sliding["tokens"] == len(losses) == 21
    assert sliding["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    beside = next(row for row in found["extrapolation"] if row["stride"] == 8)
    losses = [math.log(1 + p) for p in (*range(1, 9), *range(1, 9), *range(4, 9))]  # the last window reaches back by 3
    assert beside["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_stride_of_the_length_is_no_sliding_and_buckets_are_as_told(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path / "corpus", 100, 50)
    found = measured(tmp_path / "a", Uniform(50), shards, context_lengths=[8], stride=8)
    assert [row["stride"] for row in found["extrapolation"]] == [8]
    config = ExtrapolationConfig(context_lengths=(40,), same_tokens=50, position_buckets=(3, 20, 60))
    assert bucket_ends(config, 40, trained_length=16) == [3, 20, 40]
    assert bucket_ends(ExtrapolationConfig(), 40, trained_length=24) == [1, 2, 4, 8, 16, 24, 32, 40]
    with pytest.raises(ValueError, match=r"position_buckets=\[4, 4\] does not increase"):
        ExtrapolationConfig(position_buckets=(4, 4))


@pytest.mark.parametrize("mixer", ["standard", "lazy", "taylor"])
def test_numbers_do_not_depend_on_batches_or_on_the_pieces_of_logits(
    mixer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = TokenShards(tokenized(tmp_path / "corpus", 150).path / "validation")
    model = Transformer(tiny(mixer), 97).eval()
    large = measured(tmp_path / "large", model, shards, 10_000, context_lengths=[8, 32], stride=6)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 97 * 5)
    small = measured(tmp_path / "small", model, shards, 1, context_lengths=[8, 32], stride=6)
    for name, value in large["metrics"].items():
        assert value == pytest.approx(small["metrics"][name], rel=1e-5)


def test_losses_in_pieces_are_those_of_all_logits_and_few_logits_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = awake(tiny("standard")), some_tokens(3, 21)
    with torch.no_grad():
        expected = -torch.log_softmax(model(tokens[:, :-1]).double(), -1).gather(2, tokens[:, 1:, None])[..., 0]
    sizes = []
    honest = type(model).logits

    def watched(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[0] * VOCAB)
        return honest(self, hidden)

    monkeypatch.setattr(type(model), "logits", watched)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 1000)
    torch.testing.assert_close(token_losses(model, tokens).double(), expected, rtol=1e-5, atol=1e-5)
    assert max(sizes) <= 1000 and sum(sizes) == 3 * 20 * VOCAB


def test_a_stop_is_heeded(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path / "corpus", 100, 50)
    context = context_in(tmp_path)
    (context.scratch_dir / "stop").touch()
    config = ExtrapolationConfig(context_lengths=(8,))
    with pytest.raises(Interrupted, match="stopped after 0 of"):
        length_extrapolation.measure(config, 65_536, Uniform(50), shards, 16, 100, CPU, context)
