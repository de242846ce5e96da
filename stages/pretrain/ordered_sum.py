"""Sums over workers in the order of the micro-batches, so that they do not depend on how many workers there are.

Floating-point addition is not associative: an all-reduce adds what the workers have summed each for itself, one process
adds micro-batch after micro-batch, and the two round differently. Elastic-Softmax turns such a difference in the last
bit into another set of exact zeros, and 50 steps later into other weights. Here the gradients g_m of micro-batches
m = 0 ... M - 1 are added as one process adds them, ((g_0 + g_1) + g_2) + ...: in round t the W workers hold
micro-batches t W ... t W + W - 1; every worker receives its W-th part of all W gradients, and adds them in turn to what
it has.

A worker sends (W - 1) / W of the gradients in every round and once more to put the parts together, M / W + 1 times in
all, where a ring all-reduce sends them twice: the price is (M / W + 1) / 2 of the bytes. One micro-batch per worker
costs nothing extra.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter


def add_in_rank_order(
    running: Tensor | None,
    flat: Tensor,
    contributing: int,
    group: dist.ProcessGroup | None = None,
    received: Tensor | None = None,
) -> Tensor:
    """This worker's part [n / W] of `running` + flat of worker 0 + flat of worker 1 + ..., added from left to right.

    flat      [n], n a multiple of the W workers of the group; of worker r it is the gradient of the round's r-th
              micro-batch.
    running   this worker's part after the rounds before, None in the first; it is added to in place.
    contributing   workers that have a micro-batch in this round; what the others hold is left out.
    received  [n], memory to receive in; default: new.
    """
    workers = dist.get_world_size(group)
    received = torch.empty_like(flat) if received is None else received
    dist.all_to_all_single(received, flat, group=group)
    for part in received.view(workers, -1)[:contributing]:
        running = part.clone() if running is None else running.add_(part)
    assert running is not None, "the first worker of a round always has a micro-batch"
    return running


class OrderedSum:
    """The sum over micro-batches of lists of tensors, equal in shape from round to round and on all workers."""

    def __init__(self) -> None:
        self._running: Tensor | None = None
        self._shapes: list[torch.Size] = []
        self._buffers: tuple[Tensor, Tensor] | None = None  # new pages are the larger part of the time on a CPU

    def add(self, tensors: Sequence[Tensor], contributing: int) -> None:
        """Add one round: `tensors` of this worker's micro-batch, anything of that shape if it has none."""
        workers = dist.get_world_size()
        if self._buffers is None:
            self._shapes = [tensor.shape for tensor in tensors]
            size = sum(shape.numel() for shape in self._shapes)
            flat = tensors[0].new_zeros(size + -size % workers)
            self._buffers = flat, torch.empty_like(flat)
        flat, received = self._buffers
        torch.cat([tensor.flatten() for tensor in tensors], out=flat[: sum(shape.numel() for shape in self._shapes)])
        self._running = add_in_rank_order(self._running, flat, contributing, received=received)

    def result(self) -> list[Tensor]:
        """The sums, whole, on every worker."""
        assert self._running is not None, "nothing was added"
        whole = self._running.new_empty(dist.get_world_size() * len(self._running))
        dist.all_gather_single(whole, self._running)
        sizes = [shape.numel() for shape in self._shapes]
        parts = torch.split(whole[: sum(sizes)], sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class OrderedReduceScatter(ReduceScatter):
    """Reduce-scatter of one fully sharded module: its output is the sum of all rounds so far.

    FSDP adds the output to the gradients that a shard has, so those are dropped between the rounds. `contributing` is
    set before every backward pass, `start` called before the first of a step.
    """

    def __init__(self) -> None:
        self.contributing = 0
        self._running: Tensor | None = None

    def start(self) -> None:
        self._running = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,  # noqa: ARG002  (a sum, which it is)
        async_op: bool = False,
    ) -> None:
        assert not async_op
        output_tensor.copy_(add_in_rank_order(self._running, input_tensor, self.contributing, group))
        self._running = output_tensor.clone()  # clipping will scale the output, which becomes the gradient
