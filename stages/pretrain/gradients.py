"""Gradients of one optimizer step: each worker's share of the micro-batches, and their sum over the workers.

In round t of a step worker r of W takes micro-batch t W + r of M. W need not divide M: in the last round the workers
without a micro-batch contribute nothing, but go through the motions where the model is sharded and needs them.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lazypipe.model.loss import head_balance
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Context
from lazypipe.stages.data.batches import share_of_worker, training_batch
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.loss import window_losses
from lazypipe.stages.pretrain.ordered_sum import OrderedSum
from lazypipe.stages.pretrain.parallel import communicate_when_last, is_sharded, ordered_reductions, reshard


def accumulate_gradients(
    model: Transformer, config: PretrainConfig, shards: TokenShards, step: int, context: Context, eos_id: int | None
) -> Tensor:
    """Add this worker's share of the step's gradients to the parameters; returns its share of the mean losses, [3].

    The losses are the cross-entropy, and before their weights the head balance of `sink` and the z-loss (0 where config
    has none).
    With reduction=ordered and several workers both are whole already; the gradients of sharded parameters always are.

    eos_id: with it attention stays within documents, and the windows of a micro-batch are one packed row.
    """
    reshard(model)
    if adds_in_order(config, context):
        return _accumulate_in_order(model, config, shards, step, context, eos_id)
    total = torch.zeros(3, device=model.embedding.weight.device)
    sharded = is_sharded(model)
    share = share_of_worker(config.micro_batches_per_step, context.rank, context.world_size)
    for number, micro_batch in enumerate(share):
        if sharded:
            communicate_when_last(model, number == len(share) - 1)
        if micro_batch is not None:
            total += _backward(model, config, shards, step, micro_batch, eos_id)
        elif sharded:
            _backward(model, config, shards, step, 0, eos_id, weight=0.0)
    return total


def adds_in_order(config: PretrainConfig, context: Context) -> bool:
    return config.reduction == "ordered" and context.world_size > 1


def _accumulate_in_order(
    model: Transformer, config: PretrainConfig, shards: TokenShards, step: int, context: Context, eos_id: int | None
) -> Tensor:
    """The sums over all workers' micro-batches m = 0 ... M - 1, added in this order; see ordered_sum.py."""
    every = list(model.parameters())
    reductions = ordered_reductions(model)
    replicated = [p for p in every if not isinstance(p, DTensor)]
    for reduction in reductions:
        reduction.start()
    total = OrderedSum()
    losses = torch.zeros(3, device=model.embedding.weight.device)
    micro_batches, workers = config.micro_batches_per_step, context.world_size
    for number, micro_batch in enumerate(share_of_worker(micro_batches, context.rank, workers)):
        contributing = min(workers, micro_batches - number * workers)
        for reduction in reductions:
            reduction.contributing = contributing
        for parameter in every:
            parameter.grad = None
        if micro_batch is not None:
            losses = _backward(model, config, shards, step, micro_batch, eos_id)
        elif reductions:
            _backward(model, config, shards, step, 0, eos_id, weight=0.0)
        total.add([*map(_gradient, replicated), losses], contributing)
    *sums, losses = total.result()
    for parameter, gradient in zip(replicated, sums, strict=True):
        parameter.grad = gradient
    return losses


def _backward(
    model: Transformer,
    config: PretrainConfig,
    shards: TokenShards,
    step: int,
    micro_batch: int,
    eos_id: int | None,
    weight: float = 1.0,
) -> Tensor:
    """Add one micro-batch's gradients, divided by the M of the step, to the parameters; its losses [3], likewise.

    weight 0: of a worker that has nothing to add, but whose part of the parameters the others need meanwhile.
    """
    micro_batches, size = config.micro_batches_per_step, config.micro_batch_size
    first_sample = (step * micro_batches + micro_batch) * size
    windows = training_batch(shards, config.seq_len, config.seed, first_sample, size)
    balanced = config.sink_balance > 0 and config.model.mixer == "sink"
    head_mass: list[Tensor] | None = [] if balanced else None
    found = window_losses(
        model, windows, eos_id, "mean", head_mass, chunk_tokens=config.loss_chunk_tokens, z_loss=config.z_loss
    )
    loss = found.objective / micro_batches
    losses = torch.zeros(3, device=loss.device)
    losses[0] = found.cross_entropy / micro_batches
    losses[2] = found.log_z_squared / micro_batches
    if head_mass is not None:
        balance = head_balance(head_mass) / micro_batches
        losses[1] = balance.detach()
        loss = loss + config.sink_balance * balance
    (loss if weight == 1.0 else weight * loss).backward()  # type: ignore[no-untyped-call]
    return losses


def sum_over_workers(
    parameters: list[torch.nn.Parameter], losses: Tensor, config: PretrainConfig, context: Context
) -> bool:
    """Sum gradients and losses [n] over all workers, in place. True when any worker was asked to stop.

    One collective for everything that is not summed yet: a worker without a micro-batch contributes zeros, and all
    learn of a stop at the same step. Gradients of sharded parameters were summed by the backward pass.
    """
    if context.world_size == 1:
        return context.stop_requested
    stop = torch.tensor([float(context.stop_requested)], device=losses.device)
    if adds_in_order(config, context):
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
