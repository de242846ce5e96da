"""Facts of results that no stage made, as a manifest holds them: what a test does not name has a plain value."""

from typing import Any

from lazypipe.stages.facts import (
    EvaluateFacts,
    PretrainFacts,
    SourceFacts,
    SparsityFacts,
    SplitFacts,
    TokenizeFacts,
    UnitFacts,
)


def tokenize_facts(tokens: int = 10**6, **fields: Any) -> dict[str, Any]:
    """Of a corpus with `tokens` in either split."""
    facts = TokenizeFacts(
        vocab_size=97,
        eos_id=0,
        eos_token="<|endoftext|>",
        token_dtype="uint16",
        splits={name: SplitFacts(2, tokens, 4 * tokens, ["shard-00000.arrow"]) for name in ("train", "validation")},
        source=SourceFacts("files", "f" * 64, files=1, documents=4, skipped_rows=0, bytes=8 * tokens, commit=None),
        filters={},
        units=UnitFacts(1, 0, 0, False),
        invalid_utf8_bytes=0,
        document_length_histogram=[],
    )
    return {**facts.to_json(), **fields}


def pretrain_facts(**fields: Any) -> dict[str, Any]:
    facts = PretrainFacts(
        parameters=800_000,
        non_embedding_parameters=700_000,
        seq_len=32,
        steps=4,
        steps_executed=4,
        resumed_from=0,
        tokens=1024,
        threads=2,
        device="cpu",
        attempts=[],
        document_masking=False,
        nonfinite_steps=0,
        spikes_skipped=0,
        kernel="torch",
        world_size=1,
        parallel="replicate",
        reduction="fast",
        gpu="none",
        flops_per_token=1e6,
        peak_flops="unknown",
    )
    return {**facts.to_json(), **fields}


def evaluate_facts(**fields: Any) -> dict[str, Any]:
    facts = EvaluateFacts(
        max_seq_len=256, seq_len=256, validation_tokens_scored=1024, byte_scale=1.0, threads=2, device="cpu"
    )
    return {**facts.to_json(), **fields}


def sparsity_facts(mixer: str, **fields: Any) -> dict[str, Any]:
    facts = SparsityFacts(
        windows=16,
        windows_asked=16,
        seq_len=256,
        beyond_max_seq_len=False,
        untrained_seed=0,
        heat_map_heads=[0],
        mixer=mixer,
        threads=2,
        device="cpu",
        pattern="uniform",
        attention_layers=[0, 1],
    )
    return {**facts.to_json(), **fields}
