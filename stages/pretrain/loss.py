"""The loss of a micro-batch, which training minimises, and the validation loss.

Attention runs across the document borders inside a window, or with eos_id is confined to documents: the windows of a
batch are then one packed row, cut at window borders and behind end-of-document tokens.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lazypipe.model.loss import Losses, next_token_losses
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Context
from lazypipe.stages.data.batches import Batches, Windows, document_borders, share_of_worker
from lazypipe.stages.pretrain.parallel import is_sharded

LOSS_PARTS = 3  # of `training_loss`


def training_loss(
    model: Transformer,
    windows: Windows,
    eos_id: int | None,
    micro_batches: int,
    *,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
    sink_balance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(objective [] with gradient, its parts [3] without) of one of the micro-batches of a step, divided by their
    number.

    The objective is parts[0] + sink_balance parts[1] + z_loss parts[2]: the cross-entropy in nats, the head balance of
    `sink` (model/loss.py) and the mean of log(Z)^2; the last two are 0 where their weight is.

    chunk_tokens: predictions whose logits exist at a time; None: all up to 256 MiB of logits.
    """
    balanced = sink_balance > 0
    losses = window_losses(model, windows, eos_id, "mean", chunk_tokens, z_loss, with_head_balance=balanced)
    objective = losses.objective / micro_batches
    parts = torch.zeros(LOSS_PARTS, device=objective.device)
    parts[0] = losses.cross_entropy / micro_batches
    parts[2] = losses.log_z_squared / micro_batches
    if losses.head_balance is not None:
        balance = losses.head_balance / micro_batches
        parts[1] = balance.detach()
        objective = objective + sink_balance * balance
    return objective, parts


@torch.no_grad()
def mean_loss(
    model: Transformer, batches: Batches, eos_id: int | None, context: Context, chunk_tokens: int | None = None
) -> float:
    """Mean next-token loss in nats over the held-out windows, whose batches are shared out over the workers.

    Attention is masked as in training. The sums of the batches are added in order: any number of workers gives one
    result.
    """
    count = -(-len(batches.held_out) // batches.size)
    sums = torch.zeros(count, dtype=torch.float64, device=model.embedding.weight.device)
    for number in share_of_worker(count, context.rank, context.world_size):
        if number is None and not is_sharded(model):
            continue
        windows = batches.held_out_batch(number or 0)  # a worker without one holds parameters that the others need
        loss = window_losses(model, windows, eos_id, "sum", chunk_tokens=chunk_tokens).cross_entropy
        if number is not None:
            sums[number] = loss
    if context.world_size > 1:
        dist.all_reduce(sums)
    return float(sum(sums.tolist())) / (len(batches.held_out) * batches.seq_len)


def window_losses(
    model: Transformer,
    windows: Windows,
    eos_id: int | None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
    with_head_balance: bool = False,
) -> Losses:
    """`next_token_losses` of windows int64 [n, L + 1]; with eos_id, of each prediction from its own document alone."""
    device = model.embedding.weight.device
    borders = None if eos_id is None else torch.from_numpy(document_borders(windows, eos_id))
    tokens = torch.from_numpy(windows).to(device)
    return next_token_losses(model, tokens, reduction, borders, chunk_tokens, z_loss, with_head_balance)
