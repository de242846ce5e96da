"""Which tokens make up which batch, computed from numbers alone.

A split of N tokens has n = (N - 1) // seq_len windows; window w is tokens[w * seq_len : w * seq_len + seq_len + 1], so
neighbours share one token and every token but the first is predicted once. Training sample s is window
permuted(s mod n) of epoch s // n. Nothing is shuffled in memory and there is no state to save: a resumed or
re-sharded run asks for the same sample numbers and gets the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lazypipe.stages.contract import UserError
from lazypipe.stages.data.shards import TokenShards

Windows = npt.NDArray[np.int64]  # [n, L + 1]: inputs [:, :-1] and targets [:, 1:] of n windows of L predictions

_MASK_64 = 2**64 - 1
# Four rounds make a Feistel network a pseudo-random permutation (Luby and Rackoff 1988); halves of one or two bits,
# which tiny corpora get, mix slower.
_ROUNDS = 8


def count_windows(num_tokens: int, seq_len: int) -> int:
    """Number of windows of seq_len inputs and their next-token targets in a stream of num_tokens."""
    return max(0, (num_tokens - 1) // seq_len)


def permuted(index: int, count: int, seed: int, epoch: int) -> int:
    """Where the seeded permutation of range(count) for this epoch sends `index`; O(1) time and memory.

    A balanced Feistel network permutes the smallest power of four >= count; values outside range(count) are sent
    through again until one falls inside (cycle walking, Black and Rogaway 2002), fewer than 4 times on average.
    """
    if not 0 <= index < count:
        raise IndexError(f"index {index} is outside range({count})")
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    keys = [_mix(_mix(_mix(seed) ^ epoch) ^ round_number) for round_number in range(_ROUNDS)]
    value = index
    while True:
        left, right = value >> half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(key ^ right) & mask)
        value = left << half_bits | right
        if value < count:
            return value


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batches of a training run by number, `size` windows of seq_len predictions each.

    held_out: the windows of the validation split that the validation loss is measured on, in order (int64 [n]).
    """

    train: TokenShards
    validation: TokenShards
    held_out: npt.NDArray[np.int64]
    seq_len: int
    size: int
    seed: int

    def training(self, number: int) -> Windows:
        """Micro-batch `number` of the run, counted through all steps: samples number * size and following."""
        return training_batch(self.train, self.seq_len, self.seed, number * self.size, self.size)

    def held_out_batch(self, number: int) -> Windows:
        """Batch `number` of validation; the last one may be smaller."""
        return read_windows(self.validation, self.seq_len, self.held_out[number * self.size : (number + 1) * self.size])

    def held_out_sample(self, count: int) -> Windows:
        """The first `count` windows of validation."""
        return read_windows(self.validation, self.seq_len, self.held_out[:count])


def training_batch(shards: TokenShards, seq_len: int, seed: int, first_sample: int, size: int) -> Windows:
    """Samples first_sample ... first_sample + size - 1, int64 [size, seq_len + 1]: inputs [:, :-1], targets [:, 1:]."""
    windows = _require_windows(shards, seq_len)
    batch = np.empty((size, seq_len + 1), dtype=np.int64)
    for row in range(size):
        epoch, index = divmod(first_sample + row, windows)
        batch[row] = read_window(shards, seq_len, permuted(index, windows, seed, epoch))
    return batch


def share_of_worker(batches: int, rank: int, workers: int) -> list[int | None]:
    """Which of the batches 0 ... batches - 1 worker `rank` takes, round by round: t workers + rank in round t.

    None in the last round of a worker that has none left, so that all workers go through as many rounds.
    """
    numbers = (start + rank for start in range(0, batches, workers))
    return [number if number < batches else None for number in numbers]


def validation_windows(shards: TokenShards, seq_len: int, max_windows: int) -> npt.NDArray[np.int64]:
    """At most max_windows distinct window numbers, int64, increasing and evenly spread over the split."""
    windows = _require_windows(shards, seq_len)
    taken = min(windows, max_windows)
    return np.arange(taken, dtype=np.int64) * windows // taken


def read_window(shards: TokenShards, seq_len: int, window: int) -> npt.NDArray[np.int64]:
    """Window number `window` as int64 [seq_len + 1]."""
    return shards.read(int(window) * seq_len, seq_len + 1)


def read_windows(shards: TokenShards, seq_len: int, windows: npt.NDArray[np.int64]) -> Windows:
    """The windows with these numbers, in this order."""
    return np.stack([read_window(shards, seq_len, window) for window in windows])


def document_borders(windows: Windows, eos_id: int) -> npt.NDArray[np.int32]:
    """cu_seqlens int32 [N + 1] of the documents in windows int64 [n, L + 1]: of their inputs [:, :-1], row after row.

    A document ends with its end-of-document token, or with the window: what goes on in the next window starts there as
    a document of its own.
    """
    inputs = windows[:, :-1]
    ends = inputs == eos_id
    ends[:, -1] = True
    return np.concatenate([[0], np.flatnonzero(ends) + 1]).astype(np.int32)


def _require_windows(shards: TokenShards, seq_len: int) -> int:
    windows = count_windows(shards.num_tokens, seq_len)
    if windows == 0:
        raise UserError(
            f"the {shards.split_dir.name} split ({shards.split_dir}) holds {shards.num_tokens} tokens, but one window "
            f"of seq_len={seq_len} needs {seq_len + 1}; lower seq_len, give more text, or change "
            "tokenize.validation_fraction"
        )
    return windows


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
