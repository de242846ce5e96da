"""Probes against models that surely look back, that know nothing, or that see only so far."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Interrupted, UserError
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate import probes
from lazypipe.stages.evaluate.config import PROBES, ProbesConfig
from lazypipe.stages.evaluate.probe_sequences import Ids, Probe, make_probe, refuse_small_vocabulary, usable_tokens
from tests.model.tiny_model import tiny
from tests.stages.evaluate.language_models import Lookup, Uniform
from tests.stages.tiny_experiment import VOCAB_SIZE, context_in, tokenized

CPU = torch.device("cpu")
USABLE = np.arange(1, VOCAB_SIZE)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return TokenShards(tokenized(tmp_path_factory.mktemp("corpus"), 2000).path / "validation")


def config_of(**fields: Any) -> ProbesConfig:
    return ProbesConfig.model_validate({"lengths": [24, 60], "sequences": 6, "segment_tokens": 6, "pairs": 3, **fields})


def made(config: ProbesConfig, shards: TokenShards, kind: str, length: int = 60, number: int = 0) -> Probe:
    depth = 0.3 if kind == "needle" else None
    return make_probe(kind, config, length, number, depth, USABLE, shards)


def measured(directory: Path, model: Any, shards: TokenShards, batch_tokens: int = 200, **fields: Any) -> Any:
    context = context_in(directory)
    metrics = probes.measure(config_of(**fields), model, shards, USABLE, 32, batch_tokens, CPU, context)
    assert (context.output_dir / "figures" / "probes.png").stat().st_size > 10_000
    return metrics, json.loads((context.output_dir / "tables" / "probes.json").read_text())


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("length", [12, 24, 60])
def test_what_is_asked_for_stood_before_and_not_in_the_control(kind: str, length: int, shards: TokenShards) -> None:
    config = config_of(lengths=[length])
    for number in range(20):
        probe = made(config, shards, kind, length, number)
        assert probe.tokens.shape == probe.control.shape == (length,)
        assert (probe.tokens[probe.again + 1] == probe.tokens[probe.first + 1]).all()
        assert (probe.again > probe.first).all() and probe.again.max() < length - 1
        # The question is the same in both, the earlier answer is not.
        asked = probe.again.min()
        assert (probe.tokens[asked:] == probe.control[asked:]).all()
        changed = np.flatnonzero(probe.tokens != probe.control)
        if kind != "copy":
            assert set(probe.first + 1) <= set(changed)
            assert not set(probe.control[probe.first + 1]) & set(probe.tokens[probe.first + 1])
        assert len(changed) <= {"recall": 3, "needle": 2}.get(kind, 6)
        if kind == "recall":
            keys = probe.tokens[probe.again]
            assert (probe.tokens[probe.first] == keys).all() and len(set(keys)) == 3
            assert probe.choices is not None
            assert set(probe.choices) == set(probe.tokens[probe.again + 1]) and len(probe.choices) == 3


def test_the_needle_stands_at_its_depth_in_text_that_stays(shards: TokenShards) -> None:
    config = config_of()
    text = None
    for depth, place in ((0.0, 0), (0.5, 26), (1.0, 52)):
        probe = make_probe("needle", config, 60, 7, depth, USABLE, shards)
        assert probe.first[0] + 1 - config.key_tokens == place
        needle = probe.tokens[place : place + 4]
        assert (probe.tokens[-4:] == needle).all() and len(set(needle)) == 4
        without = np.concatenate((probe.tokens[:place], probe.tokens[place + 4 : -4]))
        text = without if text is None else text
        assert (without == text).all()


@pytest.mark.parametrize("kind", PROBES)
def test_sequences_depend_on_seed_kind_length_and_number_alone(kind: str, shards: TokenShards) -> None:
    before = np.random.get_state()[1].copy()
    one = made(config_of(), shards, kind, number=3)
    again = made(config_of(sequences=50, lengths=[60]), shards, kind, number=3)
    assert (one.tokens == again.tokens).all() and (one.control == again.control).all()
    others = [made(config_of(seed=1), shards, kind, number=3), made(config_of(), shards, kind, number=4)]
    assert all((one.tokens != other.tokens).any() for other in others)
    assert (np.random.get_state()[1] == before).all()


def test_a_model_that_looks_back_scores_one(shards: TokenShards, tmp_path: Path) -> None:
    metrics, rows = measured(tmp_path, Lookup(VOCAB_SIZE), shards, depths=[0, 0.5, 1])
    assert [(row["probe"], row["length"], row["depth"]) for row in rows] == [
        *(("recall", length, None) for length in (24, 60)),
        *(("needle", length, depth) for length in (24, 60) for depth in (0, 0.5, 1)),
        *(("induction", length, None) for length in (24, 60)),
        *(("copy", length, None) for length in (24, 60)),
    ]
    for row in rows:
        assert row["extrapolation"] == (row["length"] > 32)
        if row["probe"] == "copy":  # the copied text is random here, and one token of it can stand elsewhere too
            assert row["accuracy"] > 0.8 > row["control_accuracy"] + 0.3
            continue
        assert row["accuracy"] == 1.0 and row["accuracy_error"] == 0.0, row
        assert row["log_prob"] == pytest.approx(0, abs=1e-5)
        assert row["control_accuracy"] < 0.2 and row["gain"] > 4, row
        assert row["choice_accuracy"] == (1.0 if row["probe"] == "recall" else None)
    assert metrics["probe/recall/accuracy"] == metrics["probe/induction/accuracy_beyond"] == 1.0
    assert len(metrics) == 16


def test_a_model_that_knows_nothing_scores_chance_exactly(shards: TokenShards, tmp_path: Path) -> None:
    metrics, rows = measured(tmp_path, Uniform(VOCAB_SIZE), shards)
    for row in rows:
        assert row["chance"] == 1 / VOCAB_SIZE
        assert row["accuracy"] == row["control_accuracy"] == pytest.approx(1 / VOCAB_SIZE, rel=1e-6)
        assert row["gain"] == 0.0
        assert row["log_prob"] == pytest.approx(-np.log(VOCAB_SIZE), rel=1e-6)
        if row["probe"] == "recall":
            assert row["choice_accuracy"] == pytest.approx(row["choice_chance"]) == pytest.approx(1 / 3)
    assert all(value == 0 for name, value in metrics.items() if "gain" in name)


def test_a_model_of_short_reach_loses_what_is_far(shards: TokenShards, tmp_path: Path) -> None:
    _, rows = measured(tmp_path, Lookup(VOCAB_SIZE, reach=25), shards, kinds=["needle", "induction"], depths=[0, 1])
    accuracy = {(row["probe"], row["length"], row["depth"]): row["accuracy"] for row in rows}
    assert accuracy["induction", 24, None] == accuracy["needle", 24, 0] == accuracy["needle", 60, 1] == 1.0
    assert accuracy["induction", 60, None] < 0.1 and accuracy["needle", 60, 0] < 0.1


@pytest.mark.parametrize("mixer", ["standard", "lazy"])
def test_numbers_do_not_depend_on_the_batch_size(mixer: str, shards: TokenShards, tmp_path: Path) -> None:
    model = Transformer(tiny(mixer), VOCAB_SIZE).eval()
    state = torch.get_rng_state()
    fields = {"sequences": 3, "lengths": [24], "depths": [0.3]}
    few, _ = measured(tmp_path / "few", model, shards, 1, **fields)
    many, _ = measured(tmp_path / "many", model, shards, 10_000, **fields)
    assert torch.equal(state, torch.get_rng_state())
    assert few == pytest.approx(many, rel=1e-5, abs=1e-6)


def test_an_accuracy_counts_ties_in_shares_and_logits_against_float64() -> None:
    """score_rows against sums by hand over random logits, some of them tied."""
    from lazypipe.model.scoring import score_rows

    logits = torch.randint(4, (40, 7), generator=torch.Generator().manual_seed(0)).float()
    targets = torch.randint(7, (40,), generator=torch.Generator().manual_seed(1))
    choices = torch.stack([targets, (targets + 1) % 7, (targets + 3) % 7], dim=1)
    scores = score_rows(Uniform(7), logits, targets, choices)
    assert scores.choice_hit is not None
    for row, target in enumerate(targets.tolist()):
        line = logits[row].double()
        assert float(scores.log_prob[row]) == pytest.approx(float(torch.log_softmax(line, 0)[target]), rel=1e-5)
        for hit, among in ((scores.hit, range(7)), (scores.choice_hit, choices[row].tolist())):
            best = [token for token in among if line[token] == max(line[t] for t in among)]
            assert float(hit[row]) == pytest.approx(1 / len(best) if target in best else 0.0)


def test_usable_tokens_occur_and_stand_for_text(shards: TokenShards) -> None:
    counts = np.ones(VOCAB_SIZE + 5, dtype=np.int64)
    counts[:3] = 0  # special tokens
    found: Ids = usable_tokens(shards, counts)
    tokens = set(shards.read(0, shards.num_tokens).tolist())
    assert set(found.tolist()) == tokens - {0, 1, 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": [11]}, r"lengths=\[11\]: 11 is too short for recall, which takes 12 tokens \(pairs=3"),
        ({"lengths": [8], "kinds": ["needle"]}, r"8 is too short for needle, which takes 9"),
        ({"lengths": [20], "segment_tokens": 11, "kinds": ["copy"]}, r"20 is too short for copy, which takes 22"),
        ({"kinds": ["copy", "copy"]}, "names something twice"),
        ({"depths": [1.5]}, "less than or equal to 1"),
        ({"kinds": ["needel"]}, "recall"),
    ],
)
def test_bad_settings_are_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of(**fields)


def test_a_small_vocabulary_is_refused() -> None:
    refuse_small_vocabulary(config_of(), 13)
    with pytest.raises(UserError, match=r"recall takes 10 different tokens \(pairs=3.* only 9 stand for text"):
        refuse_small_vocabulary(config_of(segment_tokens=2), 9)
    with pytest.raises(UserError, match="induction takes 13 different tokens"):
        refuse_small_vocabulary(config_of(), 12)


def test_a_stop_is_heeded(shards: TokenShards, tmp_path: Path) -> None:
    context = context_in(tmp_path)
    (context.scratch_dir / "stop").touch()
    with pytest.raises(Interrupted, match="stopped after 0 of"):
        probes.measure(config_of(), Uniform(VOCAB_SIZE), shards, USABLE, 32, 100, CPU, context)
