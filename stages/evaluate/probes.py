"""Retrieval probes: does a model make use of what stood earlier in its context, and up to which distance?

Every probe lets something stand twice (probe_sequences.py) and looks at the predictions the second time.
`accuracy` counts those whose right token is the likeliest of the whole vocabulary. `gain` is the mean of log p(right
token) minus the same in the control, where something else had stood there, in nats: what the earlier occurrence is
worth to the model, which shows in one that has begun to look back long before its argmax does. Nothing but that
occurrence differs; a comparison with the first time (first_log_prob) would mix in what position and longer context
change. A model that knows nothing scores 1 / vocabulary and gains 0; one that ignores the occurrence gains 0.

    recall      multi-query associative recall over random pairs; also the accuracy among the values alone
    needle      a random key and value inside text, asked for at its end, by depth
    induction   a stretch of random tokens, random filler, the stretch again (Olsson et al. 2022, arXiv 2209.11895)
    copy        a stretch of text, its continuation, the stretch again
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lazypipe.model.scoring import LanguageModel, score_rows
from lazypipe.stages.contract import Context, Interrupted
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate.config import ProbesConfig
from lazypipe.stages.evaluate.probe_sequences import Ids, Probe, make_probe
from lazypipe.stages.figures import by_length
from lazypipe.stages.figures.listed import PROBES

Row = dict[str, Any]


def measure(
    config: ProbesConfig,
    model: LanguageModel,
    shards: TokenShards,
    usable: Ids,
    trained_length: int,
    batch_tokens: int,
    device: torch.device,
    context: Context,
) -> dict[str, float]:
    """Probe the model; writes tables/probes and figures/probes, returns the metrics of `summary`.

    At most about `batch_tokens` tokens pass through the model at once; the numbers do not depend on it.
    """
    rows: list[Row] = []
    cells = list(settings(config))
    for done, (kind, length, depth) in enumerate(cells):
        context.progress(done, len(cells), "probes", probe=kind, length=length)
        made = [make_probe(kind, config, length, number, depth, usable, shards) for number in range(config.sequences)]
        size = max(1, batch_tokens // length)
        scores = []
        for start in range(0, len(made), size):
            if context.stop_requested:
                raise Interrupted(f"evaluation stopped after {done} of {len(cells)} probes; it starts again next time")
            scores.append(score_probes(model, made[start : start + size], device))
        rows.append(row(kind, length, depth, model.vocab_size, trained_length, made, scores))
    context.progress(len(cells), len(cells), "probes")
    context.log_table("probes", rows)
    context.log_figure(PROBES.name, by_length.probes({"": rows}, trained_length))
    return summary(rows)


def settings(config: ProbesConfig) -> Iterator[tuple[str, int, float | None]]:
    """(kind, length, depth) of each row of the table."""
    for kind in config.kinds:
        for length in config.lengths:
            for depth in config.depths if kind == "needle" else (None,):
                yield kind, length, depth


@torch.no_grad()
def score_probes(model: LanguageModel, probes: Sequence[Probe], device: torch.device) -> dict[str, Tensor]:
    """Float32 [n, P] on the CPU for n sequences of one length: <occasion>_hit and <occasion>_log_prob of the right
    tokens at first sight, again, and again in the control; choice_hit for probes with choices.
    """

    def column(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(probe, name) for probe in probes])).to(device)

    tokens, first, again = column("tokens"), column("first"), column("again")
    hidden = model.hidden(tokens[:, :-1])
    occasions = {
        "again": (hidden, again),
        "first": (hidden, first),
        "control": (model.hidden(column("control")[:, :-1]), again),
    }
    columns = {}
    for name, (states, positions) in occasions.items():
        rows = states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1])).flatten(0, 1)
        choices = None
        if name == "again" and probes[0].choices is not None:
            choices = column("choices").repeat_interleave(positions.shape[1], dim=0)
        scores = score_rows(model, rows, tokens.gather(1, positions + 1).flatten(), choices)
        columns[f"{name}_hit"], columns[f"{name}_log_prob"] = scores.hit, scores.log_prob
        if scores.choice_hit is not None:
            columns["choice_hit"] = scores.choice_hit
    return {name: values.view(len(probes), -1).cpu() for name, values in columns.items()}


def row(
    kind: str,
    length: int,
    depth: float | None,
    vocab_size: int,
    trained_length: int,
    probes: Sequence[Probe],
    scores: Sequence[Mapping[str, Tensor]],
) -> Row:
    """One row of tables/probes. Standard errors are those of a mean over sequences: predictions of one belong together.

    The row's choice_accuracy and choice_chance are None for probes without choices.
    """
    values = {name: torch.cat([part[name] for part in scores]).double().numpy() for name in scores[0]}
    accuracy, accuracy_error = mean_and_error(values["again_hit"])
    gain, gain_error = mean_and_error(values["again_log_prob"] - values["control_log_prob"])
    choices = probes[0].choices
    return {
        "probe": kind,
        "length": length,
        "depth": depth,
        "extrapolation": length > trained_length,
        "sequences": len(probes),
        "predictions": int(values["again_hit"].size),
        "accuracy": accuracy,
        "accuracy_error": accuracy_error,
        "control_accuracy": float(values["control_hit"].mean()),
        "chance": 1 / vocab_size,
        "choice_accuracy": None if choices is None else float(values["choice_hit"].mean()),
        "choice_chance": None if choices is None else 1 / len(choices),
        "log_prob": float(values["again_log_prob"].mean()),
        "control_log_prob": float(values["control_log_prob"].mean()),
        "first_log_prob": float(values["first_log_prob"].mean()),
        "gain": gain,
        "gain_error": gain_error,
    }


def mean_and_error(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float | None]:
    """Mean of [n, P] and its standard error over the n sequences; None for one sequence."""
    by_sequence = values.mean(axis=1)
    error = None if len(values) < 2 else float(by_sequence.std(ddof=1) / len(values) ** 0.5)
    return float(by_sequence.mean()), error


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Per kind the means over all its rows within the trained length (probe/<kind>/accuracy, /gain) and beyond it
    (probe/<kind>/accuracy_beyond, /gain_beyond), where there are such rows.
    """
    means = {}
    for kind in dict.fromkeys(row["probe"] for row in rows):
        for beyond, suffix in ((False, ""), (True, "_beyond")):
            chosen = [row for row in rows if row["probe"] == kind and row["extrapolation"] == beyond]
            for name in ("accuracy", "gain") if chosen else ():
                means[f"probe/{kind}/{name}{suffix}"] = float(np.mean([row[name] for row in chosen]))
    return means
