"""Planning: which stages run, which are cached, and why. Reads the store, executes nothing, writes nothing but a cache.

    Experiment -> nodes (one per stage and variant, in topological order, each with its fingerprint)
               -> decisions (cached | run, with reasons), after the selection of --only / --from / --force

A node runs when nothing valid is stored for its recipe, when it is forced, when an input will be or has been recomputed
since (stale), or when its stored files are damaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from pydantic import BaseModel

from lazypipe.pipeline.experiment.schema import MODEL, Experiment, id_of_node
from lazypipe.pipeline.planning.code_version import stage_changed
from lazypipe.pipeline.planning.fingerprint import canonical, fingerprint
from lazypipe.pipeline.planning.stage_sources import SyntaxTrees
from lazypipe.pipeline.store.store import Entry, Generation, Store
from lazypipe.stages.config import StageConfig, flatten, identity, operational_fields
from lazypipe.stages.contract import UserError, nearest
from lazypipe.stages.stage_row import StageRow

FORCED = "forced"  # marks the scratch of a forced execution


@dataclass(frozen=True)
class Node:
    """One stage of one branch. `inputs` maps the stage's name of an input to the id of the node it comes from."""

    id: str
    row: StageRow
    variant: str | None
    config: StageConfig
    identity: Mapping[str, Any]
    source: Mapping[str, Any]
    inputs: Mapping[str, str]
    fingerprint: str

    @property
    def stage(self) -> str:
        return self.row.name


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


def corpus_of(plan: Plan) -> Decision | None:
    """The decision on the node that makes the corpus."""
    return next((decision for decision in plan.values() if decision.node.row.corpus is not None), None)


def report_of(plan: Plan) -> Decision | None:
    """The decision on the node that makes the report."""
    return next((decision for decision in plan.values() if decision.node.row.makes_report), None)


def build_nodes(experiment: Experiment, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Node]:
    """Every node of the DAG in topological order, with recipes; all stages of one variant before those of the next.

    `sources` holds by node id what the data that a node reads (a corpus, benchmarks) contributes to its recipe.
    """
    nodes: dict[str, Node] = {}
    for per_variant, group in groupby(experiment.rows, key=lambda row: row.per_variant):
        rows = list(group)
        for variant in experiment.variants if per_variant else (None,):
            for row in rows:
                inputs = _inputs(row, variant, nodes)
                id_ = id_of_node(row, variant)
                config = experiment.configs[id_]
                kept, source = identity(config), sources.get(id_, {})
                upstream = {name: nodes[origin].fingerprint for name, origin in inputs.items()}
                print_ = fingerprint(row.name, config.STAGE_VERSION, kept, source, upstream)
                nodes[id_] = Node(id_, row, variant, config, kept, source, inputs, print_)
    return nodes


def _inputs(row: StageRow, variant: str | None, nodes: Mapping[str, Node]) -> dict[str, str]:
    """Node ids by input name: by stage in a variant; by node id in a stage that reads the results of all variants."""
    read = {id_: node for id_, node in nodes.items() if node.stage in row.inputs}
    if variant is None:
        return {id_: id_ for id_ in read}
    return {node.stage: id_ for id_, node in read.items() if node.variant in (None, variant)}


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
    trees = SyntaxTrees(store.root / "cache" if store.root.exists() else None)
    for node in nodes.values():
        plan[node.id] = _decide_one(node, store, plan, forced, full_check, trees)
    trees.save()
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


def _decide_one(
    node: Node, store: Store, plan: Plan, forced: set[str], full_check: bool, trees: SyntaxTrees
) -> Decision:
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
        decision.notes = _differences(node, generation, trees) if generation else []
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


def _differences(node: Node, generation: Generation, trees: SyntaxTrees) -> list[str]:
    """What ran differently from how it would run now, without being part of the identity."""
    notes = []
    before = generation.manifest.get("operational", {})
    for name, value in operational_fields(node.config).items():
        now = list(value) if isinstance(value, tuple) else value
        if name in before and before[name] != now and not name.endswith(("paths", "path")):
            notes.append(f"ran with {name}={before[name]!r}, now {now!r} (does not change the result's identity)")
    code = generation.manifest.get("code", {})
    if stage_changed(node.row.function, code, trees):
        notes.append(f"the code of this stage has changed since ({code.get('commit') or 'unknown commit'})")
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
        version = node.config.STAGE_VERSION
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
    return path if node.row.models is not None and path.startswith(f"{MODEL}.") else f"{node.stage}.{path}"
