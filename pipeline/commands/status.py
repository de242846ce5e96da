"""`lazypipe plan` and `lazypipe status`: looking at the store without touching it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lazypipe.pipeline.execution.run import print_plan
from lazypipe.pipeline.experiment.schema import Experiment, load_experiment, resolve_root
from lazypipe.pipeline.planning.costs import cost_rows, show_costs, vocabulary
from lazypipe.pipeline.planning.plan import Selection, build_nodes, corpus_of, decide, explain
from lazypipe.pipeline.planning.preflight import inspect_sources
from lazypipe.pipeline.store.lease import living_holder
from lazypipe.pipeline.store.store import Entry, Store
from lazypipe.stages.contract import PROGRESS_FILE, UserError, nearest
from lazypipe.stages.registry import STAGES


def show_plan(
    experiment: Experiment,
    root_option: str | None,
    selection: Selection,
    with_explanation: bool,
    verify: bool,
    as_json: bool,
    console: Console,
) -> None:
    """Print decisions, reasons and what the models cost; with an explanation, the fields that differ from the nearest
    stored recipe."""
    root = resolve_root(experiment, root_option)
    store = Store(root)
    try:
        sources = inspect_sources(experiment, root, write_cache=False)
        nodes = build_nodes(sources.experiment, sources.identity)
        decisions = decide(nodes, store, selection, full_check=verify)
    except UserError:
        if not as_json:  # the models need no corpus: a hub that cannot be reached does not hide what they cost
            show_costs(cost_rows(experiment, vocabulary(experiment, None)), console)
        raise
    corpus = corpus_of(decisions)
    stored = corpus.generation if corpus is not None and corpus.action == "cached" else None
    costs = cost_rows(experiment, vocabulary(experiment, stored))
    changes = {
        node_id: explain(d.node, store)
        for node_id, d in decisions.items()
        if with_explanation
        and d.action == "run"
        and d.damage is None
        and store.entry(d.node.stage, d.node.fingerprint).current() is None
    }
    if as_json:
        rows = [
            {
                "id": node_id,
                "stage": d.node.stage,
                "variant": d.node.variant,
                "action": d.action,
                "reasons": d.reasons,
                "notes": d.notes,
                "changes": changes.get(node_id, []),
                "fingerprint": d.node.fingerprint,
                "generation": d.generation.id if d.generation else None,
            }
            for node_id, d in decisions.items()
        ]
        print(json.dumps({"experiment": experiment.name, "root": str(root), "stages": rows, "costs": costs}, indent=1))
        return
    print_plan(decisions, console)
    for node_id, lines in changes.items():
        for line in lines:
            console.print(f"{node_id}: {line}", highlight=False, markup=False, soft_wrap=True)
    for node_id, decision in decisions.items():
        for note in decision.notes:
            console.print(f"note: {node_id}: {note}", highlight=False, markup=False, soft_wrap=True)
    count = sum(d.action == "run" for d in decisions.values())
    show_costs(costs, console)
    console.print(f"{count} of {len(decisions)} stages would run", highlight=False)


def print_config(experiment: Experiment, node_id: str) -> None:
    """The resolved config of a stage as JSON: of pretrain/VARIANT what `python -m lazypipe.stages.pretrain` takes."""
    if node_id not in experiment.configs:
        raise UserError(f"--print {node_id}: there is no such stage{nearest(node_id, experiment.configs)}")
    print(json.dumps(experiment.configs[node_id].model_dump(mode="json"), indent=1))


def show_status(
    config: Path | None, overrides: Sequence[str], root_option: str | None, as_json: bool, console: Console
) -> None:
    """Every recipe below the root (or those of one experiment): stored, running, interrupted or damaged."""
    experiment = load_experiment(config, overrides) if config is not None else None
    root = resolve_root(experiment, root_option)
    store = Store(root)
    if experiment is not None:
        sources = inspect_sources(experiment, root, write_cache=False)
        nodes = build_nodes(sources.experiment, sources.identity).values()
        rows = [_row(n.stage, n.variant, store.entry(n.stage, n.fingerprint)) for n in nodes]
    else:
        rows = [_row(stage.name, None, entry) for stage in STAGES for entry in store.entries(stage.name)]
    if as_json:
        print(json.dumps({"root": str(root), "stages": rows}, indent=1))
        return
    if not rows:
        console.print(f"nothing is stored below {root}", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "state", "generation", "made", "took", "detail"):
        table.add_column(column, overflow="fold")
    for row in rows:
        name = "/".join(part for part in (row["stage"], row["variant"]) if part)
        took = "" if row["seconds"] is None else f"{row['seconds']:.0f}s"
        cells = (name, row["state"], row["generation"] or "", row["created"] or "", took, row["detail"])
        table.add_row(*map(Text, cells))  # a path with brackets is no markup
    console.print(table)


def _row(stage: str, variant: str | None, entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "stage": stage,
        "variant": variant,
        "fingerprint": entry.path.name,
        "state": "not run",
        "generation": None,
        "created": None,
        "seconds": None,
        "run_id": None,
        "detail": "",
    }
    damage = entry.damage()
    generation = entry.current() if damage is None else None
    if damage is not None:
        row |= {"state": "damaged", "detail": damage}
    elif generation is not None:
        manifest = generation.manifest
        problem = generation.problem()
        row |= {
            "variant": variant or manifest.get("variant"),
            "state": "stored" if problem is None else "damaged",
            "detail": problem or f"experiment {manifest.get('experiment')}",
            "generation": generation.id,
            "created": manifest.get("created"),
            "seconds": manifest.get("seconds"),
            "run_id": manifest.get("tracking", {}).get("run_id"),
        }
    holder = living_holder(entry.path)
    if holder is not None:
        row |= {"state": "running", "detail": f"{holder.describe()}{_progress(entry)}"}
    elif generation is None and damage is None and entry.scratch.exists():
        steps = sorted((entry.scratch / "checkpoints").glob("step-*"))
        at = f"checkpoint at step {int(steps[-1].name.removeprefix('step-'))}" if steps else "no checkpoint yet"
        row |= {"state": "interrupted", "detail": at}
    return row


def _progress(entry: Entry) -> str:
    try:
        now = json.loads((entry.scratch / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    age = max(0, int(time.time() - now["time"]))
    return f", {now['done']:g}/{now['total']:g} {now['unit']} {age}s ago"
