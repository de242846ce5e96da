"""Tensors that are spread over workers: putting the shards together."""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor


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
