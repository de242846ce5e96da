"""The next-token loss of training and validation windows, attention across document borders or confined by them."""

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from lazypipe.model.chunked_loss import Losses
from lazypipe.model.loss import next_token_losses
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Context
from lazypipe.stages.data.batches import document_borders, read_window, share_of_worker
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.parallel import is_sharded


def window_losses(
    model: Transformer,
    windows: npt.NDArray[np.int64],
    eos_id: int | None,
    reduction: str = "mean",
    head_mass: list[Tensor] | None = None,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
) -> Losses:
    """`next_token_losses` of windows int64 [n, L + 1]; with eos_id, of each prediction from its own document alone."""
    device = model.embedding.weight.device
    borders = None if eos_id is None else torch.from_numpy(document_borders(windows, eos_id))
    tokens = torch.from_numpy(windows).to(device)
    return next_token_losses(model, tokens, reduction, borders, head_mass, chunk_tokens, z_loss)


@torch.no_grad()
def mean_loss(
    model: Transformer,
    config: PretrainConfig,
    shards: TokenShards,
    windows: npt.NDArray[np.int64],
    context: Context,
    eos_id: int | None,
) -> float:
    """Mean next-token loss in nats over the given windows of seq_len tokens, batches shared out over the workers.

    Attention is masked as in training. The batches' sums are added in order: any number of workers gives one result.
    """
    size = config.micro_batch_size
    batches = -(-len(windows) // size)
    sums = torch.zeros(batches, dtype=torch.float64, device=model.embedding.weight.device)
    for number in share_of_worker(batches, context.rank, context.world_size):
        if number is None and not is_sharded(model):
            continue
        start = size * (number or 0)  # a worker without a batch still holds parameters that the others compute with
        batch = np.stack([read_window(shards, config.seq_len, w) for w in windows[start : start + size]])
        loss = window_losses(model, batch, eos_id, "sum", chunk_tokens=config.loss_chunk_tokens).cross_entropy
        if number is not None:
            sums[number] = loss
    if context.world_size > 1:
        dist.all_reduce(sums)
    return float(sum(sums.tolist())) / (len(windows) * config.seq_len)
