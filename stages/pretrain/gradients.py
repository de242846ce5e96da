"""Gradients of one optimizer step: each worker's share of the micro-batches, and their sum over the workers.

In round t of a step worker r of W takes micro-batch t W + r of M. W need not divide M: in the last round the workers
without a micro-batch add nothing, but where the model is sharded they pass a batch through it all the same, because the
others need their part of the parameters.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Context
from lazypipe.stages.data.batches import share_of_worker
from lazypipe.stages.pretrain.loss import LOSS_PARTS
from lazypipe.stages.pretrain.ordered_sum import OrderedSum
from lazypipe.stages.pretrain.parallel import communicate_when_last, is_sharded, ordered_reductions, reshard


class Backward(Protocol):
    def __call__(self, micro_batch: int, weight: float = 1.0) -> Tensor:
        """Add the gradients of one micro-batch of the step, times `weight`, to those of the parameters.

        Returns the parts [3] of its loss (`training_loss`), without `weight`. Gradients and parts are divided by the
        number of micro-batches of the step.
        """


def accumulate_gradients(
    model: Transformer, backward: Backward, micro_batches: int, context: Context, ordered: bool
) -> Tensor:
    """Add this worker's share of the step's gradients to the parameters; returns its share of the loss's parts [3].

    ordered: both are the sums over all workers already (ordered_sum.py); gradients of sharded parameters always are.
    """
    reshard(model)
    if ordered:
        return _accumulate_in_order(model, backward, micro_batches, context)
    sharded = is_sharded(model)
    share = share_of_worker(micro_batches, context.rank, context.world_size)
    total = torch.zeros(LOSS_PARTS, device=next(model.parameters()).device)
    for number, micro_batch in enumerate(share):
        if sharded:
            communicate_when_last(model, number == len(share) - 1)
        if micro_batch is not None:
            total += backward(micro_batch)
        elif sharded:
            backward(0, weight=0.0)
    return total


def _accumulate_in_order(model: Transformer, backward: Backward, micro_batches: int, context: Context) -> Tensor:
    """The sums over all workers' micro-batches m = 0 ... M - 1, added in this order; see ordered_sum.py."""
    every = list(model.parameters())
    reductions = ordered_reductions(model)
    replicated = [p for p in every if not isinstance(p, DTensor)]
    for reduction in reductions:
        reduction.start()
    total = OrderedSum()
    workers = context.world_size
    losses = torch.zeros(LOSS_PARTS, device=every[0].device)
    for number, micro_batch in enumerate(share_of_worker(micro_batches, context.rank, workers)):
        contributing = min(workers, micro_batches - number * workers)
        for reduction in reductions:
            reduction.contributing = contributing
        for parameter in every:
            parameter.grad = None
        if micro_batch is not None:
            losses = backward(micro_batch)
        elif reductions:
            backward(0, weight=0.0)
        total.add([*map(_gradient, replicated), losses], contributing)
    *sums, losses = total.result()
    for parameter, gradient in zip(replicated, sums, strict=True):
        parameter.grad = gradient
    return losses


def sum_over_workers(parameters: list[torch.nn.Parameter], losses: Tensor, context: Context, ordered: bool) -> bool:
    """Sum gradients and losses [n] over all workers, in place. True when any worker was asked to stop.

    One collective for everything that is not summed yet: a worker without a micro-batch adds zeros, and all learn of a
    stop at the same step. Gradients of sharded parameters were summed by the backward pass; with `ordered` all were.
    """
    if context.world_size == 1:
        return context.stop_requested
    stop = torch.tensor([float(context.stop_requested)], device=losses.device)
    if ordered:
        dist.all_reduce(stop)
        return bool(stop > 0)
    replicated = [p for p in parameters if not isinstance(p, DTensor)]
    gradients = [_gradient(parameter) for parameter in replicated]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), losses, stop])
    dist.all_reduce(flat)
    sizes = [*(gradient.numel() for gradient in gradients), losses.numel(), 1]
    *sums, loss_sums, stop_sum = torch.split(flat, sizes)
    for parameter, gradient in zip(replicated, sums, strict=True):
        parameter.grad = gradient.view_as(parameter)
    losses.copy_(loss_sums)
    return bool(stop_sum > 0)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
