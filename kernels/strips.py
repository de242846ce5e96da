"""The geometry of the blockwise backend: strips of query rows, their scores, thresholds and active key blocks.

The distance bias depends on i - j only, so one [BLOCK, W + BLOCK - 1] band per head, causal mask included, serves every
strip. Query heads that share a key head are stacked as extra rows of one strip, so that keys are never repeated and
dK, dV need no reduction over the group. A pair below is one (batch, key head).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import document_starts

BLOCK = 128
LOG2_E = math.log2(math.e)
# A task takes so many pairs that its widest strip has about this many scores: 2 MB of float32. With half as many
# L = 2048 took 1.1 times as long, as lanes pay for every call; with twice as many L = 256 took 1.15 times as long.
STRIP_ELEMENTS = 1 << 19


class Strip(NamedTuple):
    """Query rows [row0, row1) of pairs [pair0, pair1) = `batches` x `heads`, against keys [key0, key1)."""

    batches: slice
    heads: slice
    row0: int
    row1: int
    key0: int
    key1: int
    pair0: int
    pair1: int


class Problem(NamedTuple):
    """The inputs in the layout and dtype the strips work in."""

    q: Tensor  # [B, Hkv, group, Lq, D], times scale log2(e)
    k: Tensor  # [B * Hkv, Lk, D]
    v: Tensor  # [B * Hkv, Lk, D]
    band: Tensor  # [Hkv, group, BLOCK, W + BLOCK - 1]: log2(e) bias, 0 beyond the window, -inf above the diagonal
    token_count: Tensor  # n_i [Lq]
    lse: Tensor | None  # [B, Hkv, group, Lq, 1], log2 units; None before it is known
    thresholds: Tensor  # tau_h / n_i [Hkv, group, Lq, 1]
    single: list[int]  # rows with n_i = 1
    first_key: Tensor | None  # [Lq] int64, first key of each row's document; None without packed documents
    position_offset: int
    some_tau_positive: bool
    some_tau_negative: bool
    tasks: list[list[Strip]]  # strips of one task share their pairs, and no two tasks share any

    @property
    def shift(self) -> int:
        """Position of query 0 among the keys at hand."""
        return self.k.shape[1] - self.q.shape[3]


def prepare(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, tau: Tensor, cu_seqlens: Tensor | None, offset: int, scale: float,
    lse: Tensor | None = None,
) -> Problem:  # fmt: skip
    """Casts to the compute dtype (float32, or float64 for float64 inputs) and cuts the work into strips.

    Scores are in log2 units: exp2 took a third of the time of exp. `lse` [B, Hq, Lq], in log2 units, is the forward's.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads_kv, key_len, _ = k.shape
    query_len, group = q.shape[2], q.shape[1] // heads_kv
    shift = key_len - query_len
    token_count = torch.arange(shift + offset + 1, shift + offset + query_len + 1)
    first_key = None
    if cu_seqlens is not None:
        first_key = document_starts(cu_seqlens, query_len)
        token_count = token_count - first_key
    counts = token_count.to(compute)
    return Problem(
        q=torch.unflatten(q.to(compute) * (scale * LOG2_E), 1, (heads_kv, group)),  # bfloat16 would round the product
        k=k.to(compute).contiguous().flatten(0, 1),
        v=v.to(compute).contiguous().flatten(0, 1),
        band=torch.unflatten(_band(bias * LOG2_E, compute), 0, (heads_kv, group)),
        token_count=counts,
        lse=None if lse is None else torch.unflatten(lse, 1, (heads_kv, group)).unsqueeze(-1),
        thresholds=tau.to(compute).view(heads_kv, group, 1, 1) / counts[:, None],
        single=(token_count == 1).nonzero().flatten().tolist(),
        first_key=first_key,
        position_offset=offset,
        some_tau_positive=bool((tau > 0).any()),
        some_tau_negative=bool((tau < 0).any()),
        tasks=_cut(batch, heads_kv, group, query_len, shift, first_key),
    )


def _cut(
    batch: int, heads_kv: int, group: int, query_len: int, shift: int, first_key: Tensor | None
) -> list[list[Strip]]:
    """Tasks of several whole batches, or of some key heads of one batch, cut into strips of BLOCK rows."""
    rows = []
    for row0 in range(0, query_len, BLOCK):
        row1 = min(row0 + BLOCK, query_len)
        key0 = 0 if first_key is None else int(first_key[row0]) // BLOCK * BLOCK
        rows.append((row0, row1, key0, shift + row1))
    widest = max((row1 - row0) * (key1 - key0) for row0, row1, key0, key1 in rows)
    pairs = min(STRIP_ELEMENTS // (group * widest), -(-batch * heads_kv // torch.get_num_threads()))
    batch_step, head_step = max(1, pairs // heads_kv), max(1, min(pairs, heads_kv))
    tasks = []
    for b in range(0, batch, batch_step):
        b_end = min(b + batch_step, batch)
        for h in range(0, heads_kv, head_step):
            h_end = min(h + head_step, heads_kv)
            pair0, pair1 = b * heads_kv + h, (b_end - 1) * heads_kv + h_end
            tasks.append([Strip(slice(b, b_end), slice(h, h_end), *row, pair0, pair1) for row in rows])
    return tasks


def scratch(p: Problem, task: list[Strip], count: int) -> list[Tensor]:
    """`count` flat tensors, each as large as the task's largest strip of scores."""
    group = p.q.shape[2]
    size = max((s.pair1 - s.pair0) * group * (s.row1 - s.row0) * (s.key1 - s.key0) for s in task)
    return [torch.empty(size, dtype=p.q.dtype) for _ in range(count)]


def _band(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """band[h, m, c] = bias[h, W - 1 + m - c], the scores' additive term for the last W + BLOCK - 1 keys of a strip."""
    heads, window = bias.shape
    beyond = bias.new_zeros(heads, BLOCK - 1)
    future = bias.new_full((heads, BLOCK - 1), -torch.inf)
    descending = torch.cat([beyond, bias.flip(-1), future], dim=-1).to(dtype)
    length = descending.shape[-1]
    rows_reversed = descending.as_strided((heads, BLOCK, window + BLOCK - 1), (length, 1, 1))
    return rows_reversed.flip(1)


def band_gradient(band_grad: Tensor, window: int) -> Tensor:
    """Sums each diagonal of a band gradient [H, BLOCK, W + BLOCK - 1] into dbias [H, W]."""
    heads, rows, columns = band_grad.shape
    diagonals = band_grad.as_strided((heads, window, rows), (rows * columns, 1, columns + 1))
    return diagonals.sum(-1).flip(-1)


def band_columns(p: Problem, s: Strip) -> tuple[int, slice]:
    """(how many last columns of the strip the band covers, which columns of the band they are)."""
    end = p.band.shape[-1] - (BLOCK - (s.row1 - s.row0))
    covered = min(end, s.key1 - s.key0)
    return covered, slice(end - covered, end)


def view5(p: Problem, s: Strip, x: Tensor) -> Tensor:
    """[pairs, group * rows, n] seen as [batches, heads, group, rows, n]."""
    heads = s.heads.stop - s.heads.start
    return x.view(-1, heads, p.q.shape[2], s.row1 - s.row0, x.shape[-1])


def stacked_rows(s: Strip, x: Tensor) -> Tensor:
    """The strip's rows of x [B, Hkv, group, Lq, D], as [pairs, group * rows, D]."""
    return x[s.batches, s.heads, :, s.row0 : s.row1].flatten(2, 3).flatten(0, 1)


def carve(space: Tensor, shape: Sequence[int]) -> Tensor:
    """A contiguous tensor out of flat scratch space: fresh ones would cost their page faults."""
    return space[: math.prod(shape)].view(*shape)


def strip_scores(p: Problem, s: Strip, rows_q: Tensor, space: Tensor) -> Tensor:
    """Biased and masked scores [pairs, group * rows, keys] in log2 units, less lse where known, built in `space`."""
    scores = carve(space, (*rows_q.shape[:2], s.key1 - s.key0))
    torch.bmm(rows_q, p.k[s.pair0 : s.pair1, s.key0 : s.key1].mT, out=scores)
    covered, columns = band_columns(p, s)
    by_head = view5(p, s, scores)
    if p.lse is not None:  # as one more column of the product it cost a copy of k: 40 ms of 2100 at L = 8192
        by_head.sub_(p.lse[s.batches, s.heads, :, s.row0 : s.row1])
    by_head[..., -covered:].add_(p.band[s.heads, :, : s.row1 - s.row0, columns])
    if p.first_key is not None:
        last_start = int(p.first_key[s.row1 - 1])
        if last_start > s.key0:
            hidden = torch.arange(s.key0, last_start) < p.first_key[s.row0 : s.row1, None]
            by_head[..., : last_start - s.key0].masked_fill_(hidden, -torch.inf)
    return scores


def strip_probs(p: Problem, s: Strip, rows_q: Tensor, space: Tensor) -> Tensor:
    """p [pairs, group * rows, keys] of a strip whose lse is known, built in `space`."""
    probs = strip_scores(p, s, rows_q, space).exp2_()
    for row in p.single:
        if s.row0 <= row < s.row1:  # exactly 1: rounding would put it on either side of tau = -1
            view5(p, s, probs)[..., row - s.row0, row + p.shift - s.key0] = 1.0
    return probs


def strip_weights(
    p: Problem, s: Strip, probs: Tensor, thresholds: Tensor, run: tuple[int, int], space: Tensor
) -> Tensor:
    """a = max(p + tau / n, 0) (Elastic-Softmax) of the columns of one run, [pairs, group * rows, run], in `space`.

    `thresholds` holds tau / n, by head and row; p and thresholds may share a factor per row, which a then has too.
    """
    weights = carve(space, (*probs.shape[:2], run[1] - run[0]))
    by_head = view5(p, s, weights)
    torch.add(view5(p, s, probs)[..., run[0] : run[1]], thresholds, out=by_head).relu_()
    if p.some_tau_positive:  # masked positions came out positive
        columns = torch.arange(s.key0 + run[0], s.key0 + run[1])
        hidden = columns > torch.arange(s.row0, s.row1)[:, None] + p.shift
        if p.first_key is not None:
            hidden |= columns < p.first_key[s.row0 : s.row1, None]
        by_head.masked_fill_(hidden, 0.0)
    return weights


def block_peaks(scores: Tensor) -> Tensor:
    """Row maxima over each key block, [pairs, group * rows, key blocks]."""
    whole = scores.shape[-1] // BLOCK * BLOCK
    peaks = torch.unflatten(scores[..., :whole], -1, (-1, BLOCK)).amax(-1)
    if whole < scores.shape[-1]:
        peaks = torch.cat([peaks, scores[..., whole:].amax(-1, keepdim=True)], dim=-1)
    return peaks


def active_runs(active: Tensor, s: Strip) -> list[tuple[int, int]]:
    """Maximal column ranges of the strip whose blocks are active for any of its heads."""
    width = s.key1 - s.key0
    runs: list[tuple[int, int]] = []
    for block, flag in enumerate(active.flatten(0, -2).any(0).tolist()):
        if not flag:
            continue
        start, stop = block * BLOCK, min((block + 1) * BLOCK, width)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs
