"""A store filled by hand with small committed generations, for tests that plan and walk without computing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lazypipe.pipeline.experiment.schema import compose
from lazypipe.pipeline.planning.code_version import sources_digest
from lazypipe.pipeline.planning.plan import Decision, Node, build_nodes
from lazypipe.pipeline.store.store import MANIFEST, Generation, Store
from lazypipe.stages.config import operational_fields
from tests.stages.made_facts import tokenize_facts

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"hidden_size": 32, "num_heads": 2, "max_seq_len": 64},
    "pretrain": {"seq_len": 32, "tokens_per_step": 64, "micro_batch_size": 2},
    "variants": {"lazy": {"mixer": "lazy"}, "standard": {}},
}
SOURCE: dict[str, dict[str, Any]] = {
    "tokenize": {"source": {"files": [{"format": "text", "sha256": "ab" * 32}]}, "tokenizer": {}}
}
ALL = [
    *("tokenize", "pretrain/lazy", "evaluate/lazy", "sparsity/lazy"),
    *("pretrain/standard", "evaluate/standard", "sparsity/standard", "report"),
]


def nodes_of(source: Mapping[str, Mapping[str, Any]] = SOURCE, **sections: Any) -> dict[str, Node]:
    return build_nodes(compose({**SMALL, **sections}), source)


def commit(store: Store, nodes: Mapping[str, Node], node_id: str, **manifest: Any) -> Generation:
    """Store a generation of a node, made from the current generations of its inputs."""
    node = nodes[node_id]
    entry = store.entry(node.stage, node.fingerprint)
    name = entry.next_generation()
    (entry.path / name).mkdir(parents=True)
    (entry.path / name / "result.txt").write_text(node_id)
    inputs = {}
    for key, origin in node.inputs.items():
        upstream = store.entry(nodes[origin].stage, nodes[origin].fingerprint).current()
        assert upstream is not None, f"{node_id} needs {origin}"
        inputs[key] = {"fingerprint": upstream.fingerprint, "generation": upstream.id}
    body = {
        "stage": node.stage,
        "variant": node.variant,
        "fingerprint": node.fingerprint,
        "stage_version": node.config.STAGE_VERSION,
        "config": node.config.model_dump(mode="json"),
        "identity": dict(node.identity),
        "source": dict(node.source),
        "operational": json.loads(json.dumps(operational_fields(node.config))),
        "inputs": inputs,
        "metrics": {},
        "facts": tokenize_facts(),
        "created": f"2026-01-01T00:00:{len(list(store.root.rglob(MANIFEST))):02d}",
        "code": {"commit": "c0ffee", "sources_sha256": sources_digest(), "stage_sha256": "unknown"},
    }
    return entry.commit(name, body | manifest)


def filled(root: Path, nodes: Mapping[str, Node], ids: Iterable[str] = ALL) -> Store:
    store = Store(root)
    for node_id in ids:
        commit(store, nodes, node_id)
    return store


def running(plan: Mapping[str, Decision]) -> list[str]:
    return [node_id for node_id, decision in plan.items() if decision.action == "run"]
