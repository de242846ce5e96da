"""Tensors that are spread over workers: putting the shards together, and cutting a whole into shards."""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every worker; all workers must call it. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """`tensors` on the CPU with the shards of all workers put together, one after the other; {} unless `keep`.

    All workers must call it; usually only the first keeps the result.
    """
    found = {}
    for name, tensor in tensors.items():
        together = whole(tensor.detach())
        if keep:
            found[name] = together.cpu().contiguous()
    return found


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor`, which all workers have whole, on the device of `parameter` and sharded like it.

    A tensor of another shape, such as an optimizer's count of steps, stays whole.
    """
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        # Every worker cuts its own part: they have all read the same file.
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor
