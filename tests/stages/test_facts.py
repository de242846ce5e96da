"""Facts survive the manifest, those of older commits have the values of their time, and what is missing is named."""

import json

import pytest

from lazypipe.stages.contract import UserError
from lazypipe.stages.facts import Attempt, ComputeFacts, Facts, PretrainFacts, SparsityFacts, TokenizeFacts
from tests.stages.made_facts import evaluate_facts, pretrain_facts, sparsity_facts, tokenize_facts


def through_json(facts: Facts) -> dict[str, object]:
    written: dict[str, object] = json.loads(json.dumps(facts.to_json(), allow_nan=False))
    return written


def test_facts_are_the_same_after_a_manifest() -> None:
    facts = TokenizeFacts.read({"facts": tokenize_facts(100)})
    assert TokenizeFacts.read({"facts": through_json(facts)}) == facts
    assert facts.splits["validation"].tokens == 100 and facts.source.commit is None
    assert "commit" not in facts.to_json()["source"]
    first = {"attempt": 1, "started": "2026-01-01T00:00:00+00:00", "from_step": 0, "workers": 2, "cause": None}
    training = PretrainFacts.read({"facts": pretrain_facts(attempts=[first])})
    assert training.attempts == [Attempt(1, "2026-01-01T00:00:00+00:00", 0, 2, None)]
    assert PretrainFacts.read({"facts": through_json(training)}) == training
    assert training.to_json()["attempts"] == [first] and "preflight" not in training.to_json()


def test_a_manifest_of_before_a_fact_existed_has_the_value_of_its_time() -> None:
    older = pretrain_facts()
    for name in ("document_masking", "spikes_skipped", "attempts", "gpu", "parallel"):
        del older[name]
    facts = PretrainFacts.read({"facts": older})
    assert (facts.document_masking, facts.spikes_skipped, facts.attempts) == (False, 0, [])
    assert facts.gpu is None and facts.parallel == "replicate"
    older = sparsity_facts("lazy")
    del older["pattern"]
    assert SparsityFacts.read({"facts": older}).pattern == "uniform"


def test_facts_of_a_later_version_are_passed_over() -> None:
    assert ComputeFacts.read({"facts": evaluate_facts(invented=1)}) == ComputeFacts(threads=2, device="cpu")


def test_what_is_missing_is_named_with_its_place() -> None:
    facts = pretrain_facts()
    del facts["seq_len"], facts["steps"]
    manifest = {"stage": "pretrain", "variant": "lazy", "generation": "g0002", "facts": facts}
    with pytest.raises(UserError, match=r"facts of pretrain/lazy, generation g0002, lack seq_len, steps.*--force"):
        PretrainFacts.read(manifest)
    splits = {"train": {"documents": 1, "bytes": 1, "shards": []}}
    with pytest.raises(UserError, match=r"splits\.train, lack tokens"):
        TokenizeFacts.read({"facts": tokenize_facts(splits=splits)})
