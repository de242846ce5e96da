"""Gradients of one optimizer step: each worker's share of the micro-batches, and their sum over the workers."""

import torch
import torch.distributed as dist
from torch import Tensor

from model.loss import head_balance
from model.transformer import Transformer
from stages.batches import training_batch
from stages.contract import Context
from stages.pretrain_config import PretrainConfig
from stages.shards import TokenShards
from stages.window_losses import window_losses


def accumulate_gradients(
    model: Transformer, config: PretrainConfig, shards: TokenShards, step: int, context: Context, eos_id: int | None
) -> Tensor:
    """Add this worker's share of the step's gradients to the parameters; returns its share of the mean losses, [2].

    The losses are the cross-entropy, and the head balance of `sink` before its weight (0 where config has none).

    eos_id: with it attention stays within documents, and the windows of a micro-batch are one packed row.
    """
    micro_batches, size = config.micro_batches_per_step, config.micro_batch_size
    total = torch.zeros(3, device=model.embedding.weight.device)
    balanced = config.sink_balance > 0 and config.model.mixer == "sink"
    for micro_batch in range(context.rank, micro_batches, context.world_size):
        first_sample = (step * micro_batches + micro_batch) * size
        windows = training_batch(shards, config.seq_len, config.seed, first_sample, size)
        head_mass: list[Tensor] | None = [] if balanced else None
        losses = window_losses(
            model, windows, eos_id, "mean", head_mass, chunk_tokens=config.loss_chunk_tokens, z_loss=config.z_loss
        )
        loss = losses.objective / micro_batches
        total[0] += losses.cross_entropy / micro_batches
        total[2] += losses.log_z_squared / micro_batches
        if head_mass is not None:
            balance = head_balance(head_mass) / micro_batches
            total[1] += balance.detach()
            loss = loss + config.sink_balance * balance
        loss.backward()  # type: ignore[no-untyped-call]
    return total


def sum_over_workers(parameters: list[torch.nn.Parameter], losses: Tensor, context: Context) -> bool:
    """Sum gradients and losses [n] over all workers, in place. True when any worker was asked to stop.

    One collective for everything: a worker without a micro-batch contributes zeros, and all learn of a stop at the
    same step.
    """
    if context.world_size == 1:
        return context.stop_requested
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    stop = torch.tensor([float(context.stop_requested)], device=losses.device)
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), losses, stop])
    dist.all_reduce(flat)
    sizes = [*(gradient.numel() for gradient in gradients), losses.numel(), 1]
    *sums, loss_sums, stop_sum = torch.split(flat, sizes)
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient.view_as(parameter)
    losses.copy_(loss_sums)
    return bool(stop_sum > 0)
