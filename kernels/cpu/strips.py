"""The geometry of the blockwise backend: strips of query rows, their scores, thresholds and active key blocks.

The distance bias depends on i - j only, so one [BLOCK, W + BLOCK - 1] band per head, causal mask included, serves every
strip. Query heads that share a key head are stacked as extra rows of one strip, so that keys are never repeated and
dK, dV need no reduction over the group. A pair below is one (batch, key head).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lazypipe.kernels.reference import LOG2_E, document_starts

BLOCK = 128
# A task takes so many pairs that its widest strip has about this many scores: 2 MB of float32. With half as many
# L = 2048 took 1.1 times as long, as lanes pay for every call; with twice as many L = 256 took 1.15 times as long.
STRIP_ELEMENTS = 1 << 19


class Strip(NamedTuple):
    """Query rows [row0, row1) against keys [key0, key1)."""

    row0: int
    row1: int
    key0: int
    key1: int


class Task(NamedTuple):
    """All strips of pairs [pair0, pair1) = `batches` x `heads`."""

    batches: slice
    heads: slice
    pair0: int
    pair1: int
    strips: list[Strip]


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
    tasks: list[Task]  # no two share a pair

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


def _cut(batch: int, heads_kv: int, group: int, query_len: int, shift: int, first_key: Tensor | None) -> list[Task]:
    """Tasks of several whole batches, or of some key heads of one batch, cut into strips of BLOCK rows."""
    strips = []
    for row0 in range(0, query_len, BLOCK):
        row1 = min(row0 + BLOCK, query_len)
        key0 = 0 if first_key is None else int(first_key[row0]) // BLOCK * BLOCK
        strips.append(Strip(row0, row1, key0, shift + row1))
    widest = max((row1 - row0) * (key1 - key0) for row0, row1, key0, key1 in strips)
    pairs = min(STRIP_ELEMENTS // (group * widest), -(-batch * heads_kv // torch.get_num_threads()))
    batch_step, head_step = max(1, pairs // heads_kv), max(1, min(pairs, heads_kv))
    tasks = []
    for b in range(0, batch, batch_step):
        b_end = min(b + batch_step, batch)
        for h in range(0, heads_kv, head_step):
            h_end = min(h + head_step, heads_kv)
            pair0, pair1 = b * heads_kv + h, (b_end - 1) * heads_kv + h_end
            tasks.append(Task(slice(b, b_end), slice(h, h_end), pair0, pair1, strips))
    return tasks


class TaskViews(NamedTuple):
    """A task's share of the inputs; lists are by strip, in the stacked layout [pairs, group * rows, n].

    Every call into torch gives up the interpreter lock and then waits until the other lanes leave it free. Cutting all
    strips in one call, instead of each in its turn, is half of what keeps lanes from waiting for one another.
    """

    rows_q: list[Tensor]
    keys: Tensor  # [pairs, Lk, D]
    keys_t: Tensor  # [pairs, D, Lk]
    values: Tensor  # [pairs, Lk, D]
    values_t: Tensor  # [pairs, D, Lk]
    thresholds: list[Tensor]
    lse: list[Tensor] | None
    band: Tensor  # [heads, group, BLOCK, W + BLOCK - 1]
    by_head: tuple[int, int, int]  # batches, heads, group


def task_views(p: Problem, task: Task) -> TaskViews:
    batches = task.batches.stop - task.batches.start
    keys, values = p.k[task.pair0 : task.pair1], p.v[task.pair0 : task.pair1]
    return TaskViews(
        rows_q=stacked_strips(p.q[task.batches, task.heads]),
        keys=keys,
        keys_t=keys.mT,
        values=values,
        values_t=values.mT,
        thresholds=stacked_strips(p.thresholds[task.heads].expand(batches, -1, -1, -1, -1)),
        lse=None if p.lse is None else stacked_strips(p.lse[task.batches, task.heads]),
        band=p.band[task.heads],
        by_head=(batches, task.heads.stop - task.heads.start, p.q.shape[2]),
    )


def stacked_strips(x: Tensor) -> list[Tensor]:
    """The strips of x [batches, heads, group, Lq, n], each as [pairs, group * rows, n]."""
    x = x.flatten(0, 1)
    if x.shape[1] == 1:
        return list(torch.split(x.flatten(1, 2), BLOCK, 1))
    return [part.flatten(1, 2) for part in torch.split(x, BLOCK, 2)]


def scratch(p: Problem, task: Task, count: int) -> list[Tensor]:
    """`count` flat tensors, each as large as the task's largest strip of scores."""
    most = max((s.row1 - s.row0) * (s.key1 - s.key0) for s in task.strips)
    size = (task.pair1 - task.pair0) * p.q.shape[2] * most
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


def view5(t: TaskViews, s: Strip, x: Tensor) -> Tensor:
    """[pairs, group * rows, n] seen as [batches, heads, group, rows, n]."""
    return x.view(*t.by_head, s.row1 - s.row0, x.shape[-1])


def carve(space: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A contiguous tensor out of flat scratch space: fresh ones would cost their page faults."""
    return space.as_strided(shape, (shape[1] * shape[2], shape[2], 1))


def strip_scores(p: Problem, t: TaskViews, index: int, s: Strip, space: Tensor) -> Tensor:
    """Biased and masked scores [pairs, group * rows, keys] in log2 units, less lse where known, built in `space`."""
    rows_q = t.rows_q[index]
    scores = carve(space, (rows_q.shape[0], rows_q.shape[1], s.key1 - s.key0))
    torch.bmm(rows_q, t.keys_t[:, :, s.key0 : s.key1], out=scores)
    if t.lse is not None:  # as one more column of the product it cost a copy of k: 40 ms of 2100 at L = 8192
        scores.sub_(t.lse[index])
    covered, columns = band_columns(p, s)
    by_head = view5(t, s, scores)
    by_head[..., -covered:].add_(t.band[..., : s.row1 - s.row0, columns])
    if p.first_key is not None:
        last_start = int(p.first_key[s.row1 - 1])
        if last_start > s.key0:
            hidden = torch.arange(s.key0, last_start) < p.first_key[s.row0 : s.row1, None]
            by_head[..., : last_start - s.key0].masked_fill_(hidden, -torch.inf)
    return scores


def strip_probs(p: Problem, t: TaskViews, index: int, s: Strip, space: Tensor) -> Tensor:
    """p [pairs, group * rows, keys] of a strip whose lse is known, built in `space`."""
    probs = strip_scores(p, t, index, s, space).exp2_()
    for row in p.single:
        if s.row0 <= row < s.row1:  # exactly 1: rounding would put it on either side of tau = -1
            view5(t, s, probs)[..., row - s.row0, row + p.shift - s.key0] = 1.0
    return probs


def strip_weights(
    p: Problem, t: TaskViews, s: Strip, probs: Tensor, thresholds: Tensor, run: tuple[int, int], space: Tensor
) -> Tensor:
    """a = max(p + tau / n, 0) (Elastic-Softmax) of the columns of one run, [pairs, group * rows, run], in `space`.

    `thresholds` [pairs, group * rows, 1] holds tau / n; p and it may share a factor per row, which a then has too.
    """
    weights = carve(space, (probs.shape[0], probs.shape[1], run[1] - run[0]))
    torch.add(probs[..., run[0] : run[1]], thresholds, out=weights).relu_()
    if p.some_tau_positive:  # masked positions came out positive
        columns = torch.arange(s.key0 + run[0], s.key0 + run[1])
        hidden = columns > torch.arange(s.row0, s.row1)[:, None] + p.shift
        if p.first_key is not None:
            hidden |= columns < p.first_key[s.row0 : s.row1, None]
        view5(t, s, weights).masked_fill_(hidden, 0.0)
    return weights


def block_peaks(scores: Tensor) -> Tensor:
    """Row maxima over each key block, [pairs, group * rows, key blocks]."""
    whole = scores.shape[-1] // BLOCK * BLOCK
    peaks = torch.unflatten(scores[..., :whole], -1, (-1, BLOCK)).amax(-1)
    if whole < scores.shape[-1]:
        peaks = torch.cat([peaks, scores[..., whole:].amax(-1, keepdim=True)], dim=-1)
    return peaks


def active_runs(active: list[list[bool]], s: Strip) -> list[tuple[int, int]]:
    """Maximal column ranges of the strip whose key blocks are active for any of its heads; `active` is by head."""
    width = s.key1 - s.key0
    runs: list[tuple[int, int]] = []
    for block, flags in enumerate(zip(*active, strict=True)):
        if not any(flags):
            continue
        start, stop = block * BLOCK, min((block + 1) * BLOCK, width)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs
