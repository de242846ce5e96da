"""Planning: which stages run, which are cached, and why. Pure: reads the store, executes and writes nothing.

    Experiment -> nodes (one per stage and variant, in topological order, each with its fingerprint)
               -> decisions (cached | run, with reasons), after the selection of --only / --from / --force

A node runs when nothing valid is stored for its recipe, when it is forced, when an input will be or has been recomputed
since (stale), or when its stored files are damaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from lazypipe.pipeline.experiment.schema import Experiment
from lazypipe.pipeline.planning.code_version import sources_digest
from lazypipe.pipeline.planning.fingerprint import canonical, fingerprint
from lazypipe.pipeline.store.store import Entry, Generation, Store
from lazypipe.stages.config import StageConfig, flatten, identity, operational_fields
from lazypipe.stages.contract import UserError, nearest

FORCED = "forced"  # marks the scratch of a forced execution
STAGES = ("tokenize", "pretrain", "evaluate", "sparsity", "report")
UPSTREAM = {"pretrain": ("tokenize",), "evaluate": ("tokenize", "pretrain"), "sparsity": ("tokenize", "pretrain")}


@dataclass(frozen=True)
class Node:
    """One stage of one branch. `inputs` maps the stage's name of an input to the id of the node it comes from."""

    id: str
    stage: str
    variant: str | None
    config: StageConfig
    identity: Mapping[str, Any]
    source: Mapping[str, Any]
    inputs: Mapping[str, str]
    fingerprint: str


@dataclass
class Decision:
    """What happens to a node. `reasons` are shown to the user; `generation` is the stored result when cached."""

    node: Node
    action: Literal["cached", "run", "skipped"]
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    generation: Generation | None = None
    forced: bool = False
    damage: str | None = None


@dataclass(frozen=True)
class Selection:
    """What the user asked for by --only, --from and --force; each holds 'stage' or 'stage/variant'."""

    only: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    force: tuple[str, ...] = ()


Plan = dict[str, Decision]


def build_nodes(
    experiment: Experiment,
    source_identity: Mapping[str, Any],
    task_identities: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Node]:
    """Every node of the DAG in topological order, with recipes.

    `source_identity` is what the corpus contributes, `task_identities` by variant what its benchmarks' data does.
    """
    nodes: dict[str, Node] = {}
    tasks = task_identities or {}

    def add(stage: str, variant: str | None, config: StageConfig, inputs: Mapping[str, str]) -> None:
        node_id = stage if variant is None else f"{stage}/{variant}"
        source = source_identity if stage == "tokenize" else tasks.get(variant or "", {}) if stage == "evaluate" else {}
        kept = identity(config)
        upstream = {name: nodes[origin].fingerprint for name, origin in inputs.items()}
        version: int = config.STAGE_VERSION  # type: ignore[attr-defined]
        print_ = fingerprint(stage, version, kept, source, upstream)
        nodes[node_id] = Node(node_id, stage, variant, config, kept, source, dict(inputs), print_)

    add("tokenize", None, experiment.tokenize, {})
    for name, variant in experiment.variants.items():
        configs: dict[str, StageConfig] = {
            "pretrain": variant.pretrain,
            "evaluate": variant.evaluate,
            "sparsity": variant.sparsity,
        }
        for stage, config in configs.items():
            inputs = {up: up if up == "tokenize" else f"{up}/{name}" for up in UPSTREAM[stage]}
            add(stage, name, config, inputs)
    add("report", None, experiment.report, {node_id: node_id for node_id in nodes})
    return nodes


def decide(nodes: Mapping[str, Node], store: Store, selection: Selection, full_check: bool = False) -> Plan:
    """Decide for every node. `full_check` verifies the sha256 of every cached file instead of sizes and mtimes."""
    asked = _select(nodes, selection.force, "--force") | _select(nodes, selection.start, "--from")
    recipes = {nodes[node_id].fingerprint for node_id in asked}  # variants with the same recipe share one result
    forced = {node.id for node in nodes.values() if node.fingerprint in recipes}
    wanted = _with_ancestors(nodes, _select(nodes, selection.only, "--only")) if selection.only else set(nodes)
    explicit = _select(nodes, selection.only, "--only")
    outside = sorted(asked - wanted)
    if outside:
        only = " ".join(f"--only {name}" for name in selection.only)
        raise UserError(f"--force or --from names {outside[0]}, which {only} leaves out; drop one of the two")
    plan: Plan = {}
    for node in nodes.values():
        plan[node.id] = _decide_one(node, store, plan, forced, full_check)
    if selection.only:
        needed = _needed(plan, explicit)
        for node_id, decision in plan.items():
            if node_id not in wanted or (node_id not in needed and decision.action == "run"):
                decision.action = "skipped"
                decision.reasons = ["not asked for by --only"]
    return plan


def _needed(plan: Plan, explicit: Iterable[str]) -> set[str]:
    """The asked-for nodes and, below those that run, whatever they need that is not stored."""
    needed: set[str] = set()
    stack = list(explicit)
    while stack:
        node_id = stack.pop()
        if node_id in needed:
            continue
        needed.add(node_id)
        if plan[node_id].action == "run":
            stack += plan[node_id].node.inputs.values()
    return needed


def _decide_one(node: Node, store: Store, plan: Plan, forced: set[str], full_check: bool) -> Decision:
    decision = Decision(node, "run")
    entry = store.entry(node.stage, node.fingerprint)
    generation, decision.damage = _stored(entry, full_check)
    fresh_inputs = [origin for origin in node.inputs.values() if plan[origin].action == "run"]
    if fresh_inputs and generation is not None:
        decision.reasons.append(f"{', '.join(fresh_inputs)} will be recomputed")
    for name, origin in node.inputs.items():
        upstream = plan[origin]
        if generation is not None and upstream.generation is not None:
            used = generation.manifest["inputs"].get(name, {}).get("generation")
            if used != upstream.generation.id:
                decision.reasons.append(f"stale: made from {used}, {origin} is now {upstream.generation.id}")
    if node.id in forced:
        decision.forced = True
        decision.reasons.insert(0, "forced")
    elif generation is not None and was_forced(entry):
        decision.reasons.insert(0, "a forced execution was interrupted, will resume")
    if decision.damage is not None:
        decision.reasons.insert(0, f"damaged: {decision.damage}")
    elif generation is None:
        decision.reasons.insert(
            0, "interrupted, will resume" if _resumable(entry) else "nothing stored for this recipe"
        )
    if not decision.reasons:
        decision.action, decision.generation = "cached", generation
        decision.notes = _differences(node, generation) if generation else []
    return decision


def _stored(entry: Entry, full_check: bool) -> tuple[Generation | None, str | None]:
    """(usable generation or None, damage or None)"""
    damage = entry.damage()
    if damage is not None:
        return None, damage
    generation = entry.current()
    if generation is None:
        return None, None
    damage = generation.problem(full=full_check)
    return (None, damage) if damage is not None else (generation, None)


def was_forced(entry: Entry) -> bool:
    """Whether an execution that was forced beside a stored result has not ended well yet."""
    return (entry.scratch / FORCED).exists()


def _resumable(entry: Entry) -> bool:
    return any((entry.scratch / "checkpoints").glob("step-*")) or any((entry.scratch / "tasks").glob("*/manifest.json"))


def _differences(node: Node, generation: Generation) -> list[str]:
    """What ran differently from how it would run now, without being part of the identity."""
    notes = []
    before = generation.manifest.get("operational", {})
    for name, value in operational_fields(node.config).items():
        now = list(value) if isinstance(value, tuple) else value
        if name in before and before[name] != now and not name.endswith(("paths", "path")):
            notes.append(f"ran with {name}={before[name]!r}, now {now!r} (does not change the result's identity)")
    if generation.manifest.get("code", {}).get("sources_sha256") not in (None, sources_digest()):
        notes.append(f"the code has changed since ({generation.manifest['code'].get('commit') or 'unknown commit'})")
    return notes


def _select(nodes: Mapping[str, Node], names: Sequence[str], option: str) -> set[str]:
    """Node ids named by 'stage' (all its variants) or 'stage/variant'."""
    chosen: set[str] = set()
    for name in names:
        matching = {node.id for node in nodes.values() if name in (node.stage, node.id)}
        if not matching:
            known = [*dict.fromkeys(node.stage for node in nodes.values()), *(i for i in nodes if "/" in i)]
            raise UserError(f"{option} {name}: there is no such stage in this experiment{nearest(name, known)}")
        chosen |= matching
    return chosen


def _with_ancestors(nodes: Mapping[str, Node], chosen: set[str]) -> set[str]:
    reached = set(chosen)
    for node_id in reversed(list(nodes)):
        if node_id in reached:
            reached |= set(nodes[node_id].inputs.values())
    return reached


def explain(node: Node, store: Store) -> list[str]:
    """Field-level differences between a node's recipe and the nearest earlier one of its stage."""
    best: tuple[float, list[str], Generation] | None = None
    now = _recipe(node.identity, node.source)
    defaults = {f"config.{name}": value for name, value in flatten(_defaults(type(node.config))).items()}
    for generation in store.generations(node.stage):
        manifest = generation.manifest
        before = _recipe(manifest.get("identity", {}), manifest.get("source", {}))
        changed = []
        version: int = node.config.STAGE_VERSION  # type: ignore[attr-defined]
        if manifest.get("stage_version", version) != version:
            changed.append(f"{node.stage}: STAGE_VERSION {manifest['stage_version']} -> {version}")
        for old_key, new_key in type(node.config).OLD_KEYS.items():
            if f"config.{old_key}" in before:
                changed.append(f"{node.stage}.{old_key} is now {node.stage}.{new_key}, another recipe")
                before.setdefault(f"config.{new_key}", before.pop(f"config.{old_key}"))
        for key in sorted(now.keys() | before.keys()):
            old, new = before.get(key, defaults.get(key)), now.get(key, defaults.get(key))
            if _comparable(old) != _comparable(new):
                changed.append(f"{_user_key(node, key)}: {_shown(old)} -> {_shown(new)}")
        same_variant = 0 if manifest.get("variant") == node.variant else 0.5
        distance = len(changed) + same_variant
        if generation.fingerprint != node.fingerprint and (best is None or distance <= best[0]):
            best = (distance, changed, generation)
    if best is None:
        return []
    _, changed, generation = best
    if not changed:
        return [f"same config as {generation.id}, but an input differs"]
    return [*changed, f"(compared with {generation.id})"]


def _recipe(identity: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """'config.lr' and 'source.files' style names of what a recipe holds; what is at its default is absent."""
    flat = flatten({"config": dict(identity), "source": dict(source)})
    return {key: value for key, value in flat.items() if value != {}}


def _defaults(config: type[BaseModel]) -> dict[str, Any]:
    """The values of fields that an identity leaves out."""
    defaults: dict[str, Any] = {}
    for name, about in config.model_fields.items():
        if not about.is_required():
            value = about.get_default(call_default_factory=True)
            defaults[name] = value.model_dump() if isinstance(value, BaseModel) else value
    return defaults


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = repr(_comparable(value))
    if len(text) <= 60:
        return text
    if isinstance(value, (list, tuple)):  # their first 60 characters may be equal
        return f"{len(value)} values, digest {hashlib.sha256(canonical(value).encode()).hexdigest()[:8]}"
    return text[:57] + "..."


def _user_key(node: Node, key: str) -> str:
    """'config.model.mixer' of a pretrain node -> 'model.mixer', 'config.lr' -> 'pretrain.lr': what the user typed."""
    if key.startswith("source."):
        return f"{node.stage}.{key.removeprefix('source.')} (content)"
    path = key.removeprefix("config.")
    return path if node.stage == "pretrain" and path.startswith("model.") else f"{node.stage}.{path}"
