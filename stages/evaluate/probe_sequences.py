"""Token sequences in which something stands twice, made on the fly; probes.py asks what a model makes of them.

Random tokens are ids that stand for text and occur in the validation split, all equally likely: ids the corpus never
shows have embeddings nobody trained. One sequence depends on (seed, kind, length, its number) alone, so that counts,
batches and other lengths change nothing, and a needle keeps its haystack at every depth.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lazypipe.stages.contract import UserError
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate.config import PROBES, ProbesConfig

Ids = npt.NDArray[np.int64]


class Probe(NamedTuple):
    """tokens, control int64 [L]; first, again int64 [P]; choices int64 [C] or None.

    tokens[again + 1] == tokens[first + 1]: the logits at `again` predict what stood at first + 1. In `control`,
    something else stood there, and all else is the same. choices: the answers among which to choose, if there are some.
    """

    tokens: Ids
    control: Ids
    first: Ids
    again: Ids
    choices: Ids | None = None


def usable_tokens(shards: TokenShards, bytes_of_token: npt.NDArray[np.int64]) -> Ids:
    """Ids that occur in the split and stand for text (special tokens stand for none), in increasing order."""
    counts = np.zeros(len(bytes_of_token), dtype=np.int64)
    for tokens in shards.pieces():
        counts += np.bincount(tokens, minlength=len(counts))
    return np.flatnonzero((counts > 0) & (bytes_of_token > 0)).astype(np.int64)


def refuse_small_vocabulary(config: ProbesConfig, available: int) -> None:
    """UserError when a probe needs more different tokens than there are."""
    for kind in config.kinds:
        needed, because = config.distinct_tokens(kind)
        if available < needed:
            raise UserError(
                f"evaluate.probes: {kind} takes {needed} different tokens ({because}), but only {available} stand for "
                "text and occur in the validation split; ask for less, or leave it out of evaluate.probes.kinds"
            )


def make_probe(
    kind: str, config: ProbesConfig, length: int, number: int, depth: float | None, usable: Ids, shards: TokenShards
) -> Probe:
    """Sequence `number` of a kind, `length` tokens long. depth: of the needle, None for the other kinds."""
    rng = np.random.default_rng([config.seed, PROBES.index(kind), length, number])
    if kind == "recall":
        return recall(rng, length, config.pairs, usable)
    text = some_text(rng, shards, length)
    if kind == "needle":
        assert depth is not None
        return needle(rng, text, config.key_tokens, config.value_tokens, depth, usable)
    size = config.segment_tokens
    if kind == "copy":
        return repeated(text[:size], text[size : length - size], some_text(rng, shards, size))
    segments = rng.choice(usable, (2, size), replace=False)
    filler = rng.choice(np.setdiff1d(usable, segments), length - 2 * size)
    return repeated(segments[0], filler, segments[1])


def some_text(rng: np.random.Generator, shards: TokenShards, length: int) -> Ids:
    return shards.read(int(rng.integers(shards.num_tokens - length + 1)), length)


def recall(rng: np.random.Generator, length: int, pairs: int, usable: Ids) -> Probe:
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): k1 v1 ... kn vn, filler, then each key
    again in another order, followed by its value. All are random tokens; keys, values and filler have none in common.

    The control shows the keys with other values at first.
    """
    drawn = rng.choice(usable, (3, pairs), replace=False)
    keys, values, others = drawn
    order = rng.permutation(pairs)
    filler = rng.choice(np.setdiff1d(usable, drawn), length - 4 * pairs)
    rest = (filler, np.stack((keys, values), axis=1)[order].ravel())
    tokens, control = (np.concatenate((np.stack((keys, shown), axis=1).ravel(), *rest)) for shown in (values, others))
    again = length - 2 * pairs + 2 * np.arange(pairs)
    return Probe(tokens, control, 2 * order, again, np.sort(values))


def needle(rng: np.random.Generator, text: Ids, key_tokens: int, value_tokens: int, depth: float, usable: Ids) -> Probe:
    """Text with a random key and value in it at `depth`; at its end the key again, followed by the value.

    All are different tokens, taken from those that this text lacks where it lacks enough of them. The text loses as
    many tokens at its end as the rest takes up. The control has the key with another value at first.
    """
    size = key_tokens + value_tokens
    text = text[: len(text) - 2 * size]
    absent = np.setdiff1d(usable, text)
    needed = size + value_tokens
    drawn = rng.choice(absent if len(absent) >= needed else usable, needed, replace=False)
    hidden, other = drawn[:size], np.concatenate((drawn[:key_tokens], drawn[size:]))
    at = round(depth * len(text))
    tokens, control = (np.concatenate((text[:at], shown, text[at:], hidden)) for shown in (hidden, other))
    value = np.arange(key_tokens - 1, size - 1)
    return Probe(tokens, control, at + value, len(text) + size + value)


def repeated(segment: Ids, between: Ids, other: Ids) -> Probe:
    """The segment, what stands between, the segment again; the control begins with the `other` segment.

    Nothing tells that the first token comes again, so it is not asked for.
    """
    tokens, control = (np.concatenate((shown, between, segment)) for shown in (segment, other))
    inside = np.arange(len(segment) - 1)
    return Probe(tokens, control, inside, len(segment) + len(between) + inside)
