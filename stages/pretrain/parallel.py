"""One model on many workers: replicated, or fully sharded (FSDP2), and what differs between the two.

Sharded are the matrices, by rows, block by block; embedding, head and all else that is a matrix outside the blocks form
a group of their own. What is small stays whole on every worker: norms and what a mechanism learns per head (tau,
distance bias). So tau [H] may be learned by more workers than heads, and keeps float32 in a bfloat16 run.

bfloat16 is what it is in one process, autocast: the workers send each other the matrices of the blocks in bfloat16,
which is what autocast would cast them to, and reduce gradients in float32; residual stream, norms and embedding stay
float32. Sharding therefore changes the order of sums and nothing else, and with reduction=ordered not even that, but
for the embedding of static_qk: FSDP2 joins the gradients that a block gives its several inputs before they are added.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Context, UserError
from lazypipe.stages.pretrain.optimizer import split_parameters
from lazypipe.stages.pretrain.ordered_sum import OrderedReduceScatter

Result = TypeVar("Result")


def check_process_group(context: Context) -> None:
    """RuntimeError unless torch.distributed's default process group has the context's workers, where it has several."""
    if context.world_size > 1 and (not dist.is_initialized() or dist.get_world_size() != context.world_size):
        raise RuntimeError(
            f"world_size={context.world_size}, but torch.distributed's process group is not initialised with as "
            "many workers; call torch.distributed.init_process_group first"
        )


def together(action: Callable[[], Result], world_size: int, group: dist.ProcessGroup | None = None) -> list[Result]:
    """What `action` returned on each worker, in the order of ranks. If it failed on one worker, it fails on all.

    Then each raises UserError if nothing but UserErrors were raised, OSError if nothing but those, else RuntimeError,
    with the messages of all; a single worker raises its own error. group: default, that of all workers.
    """
    result, failure, cause = None, None, None
    try:
        result = action()
    except (Exception, CheckpointException) as error:
        failure, cause = _failure(error), error
    outcomes: list[Any] = [(result, failure)]
    if world_size > 1:
        outcomes *= world_size
        dist.all_gather_object(outcomes, (result, failure), group=group)
    failures = list(dict.fromkeys(failure for _, failure in outcomes if failure is not None))
    if failures:
        if world_size == 1 and not isinstance(cause, CheckpointException):
            assert cause is not None
            raise cause
        kinds = {kind for kind, _ in failures}
        kind = kinds.pop() if len(kinds) == 1 else RuntimeError
        raise kind("; ".join(text for _, text in failures)) from cause
    return [result for result, _ in outcomes]


def from_first(
    action: Callable[[], Result], rank: int, world_size: int, group: dist.ProcessGroup | None = None
) -> Result:
    """What `action` returns on worker 0, which alone calls it, on every worker; its error is raised by all of them."""
    results: list[Any] = together(lambda: action() if rank == 0 else None, world_size, group)
    result: Result = results[0]
    return result


def _failure(error: BaseException) -> tuple[type[Exception], str]:
    """(UserError, OSError or, of anything else, RuntimeError; the message): of all workers, where
    torch.distributed.checkpoint has collected their errors.
    """
    errors = [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    known = (kind for kind in (UserError, OSError) if all(isinstance(e, kind) for e in errors))
    return next(known, RuntimeError), "; ".join(dict.fromkeys(map(str, errors)))


def place_model(
    model: Transformer, device: torch.device, world_size: int, *, parallel: str, dtype: str, ordered: bool
) -> Transformer:
    """`model` on `device`; with parallel "fsdp" its matrices are sharded over all workers, see `shard_model`.

    A sharded model computes through its own call, `hidden`, `hidden_and_head_mass` and `statistics_by_layer`; all
    workers must make every such call, with or without a batch of their own.
    """
    if parallel == "fsdp" and world_size > 1:
        shard_model(model, device, world_size, dtype=dtype, ordered=ordered)
    return model.to(device)


def shard_model(model: Transformer, device: torch.device, world_size: int, *, dtype: str, ordered: bool) -> None:
    """`fully_shard` (FSDP2) each block and the rest, over the default process group of `world_size` workers.

    dtype: "float32" or "bfloat16", in which the matrices of the blocks are sent. ordered: gradients are summed in the
    order of the micro-batches (ordered_sum.py).
    """
    mesh = init_device_mesh(device.type, (world_size,))
    small = set(split_parameters(model)[1].values())
    low = torch.bfloat16 if dtype == "bfloat16" else None
    # Autocast casts activations where they need it; FSDP casting the input of a block would round the residual stream.
    blocks = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=blocks, ignored_params=small)
        register_fsdp_forward_method(block, "statistics")
    # The rest is needed at the end of the forward pass and at the start of the backward pass: kept between.
    fully_shard(model, mesh=mesh, mp_policy=rest, ignored_params=small, reshard_after_forward=False)
    for method in ("hidden", "hidden_and_head_mass", "statistics_by_layer"):
        register_fsdp_forward_method(model, method)
    for module in sharded_modules(model):
        # Losses are divided by the micro-batches of the whole step already.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if ordered:
            reduction = OrderedReduceScatter()
            module.set_custom_reduce_scatter(reduction)
            # Where `ordered_reductions` finds it.
            module.ordered_reduction = reduction  # type: ignore[attr-defined]


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Give up parameters put together for a forward pass without a backward pass, as validation leaves them.

    Until then `model.parameters()` are those, and not the shards that the optimizer updates.
    """
    for module in sharded_modules(model):
        module.reshard()


def communicate_when_last(model: nn.Module, last: bool) -> None:
    """Before a backward pass: gradients are reduced, and parameters given up, after the step's last one only."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)
    model.set_is_last_backward(last)


def ordered_reductions(model: nn.Module) -> list[OrderedReduceScatter]:
    """The reduce-scatters of a model that was sharded with reduction=ordered, [] of any other."""
    found = [getattr(module, "ordered_reduction", None) for module in sharded_modules(model)]
    return [reduction for reduction in found if reduction is not None]


def gradient_norm(parameters: Iterable[nn.Parameter], ordered: bool) -> Tensor:
    """Euclidean norm [] of all gradients together, over all shards.

    ordered: from whole gradients, tensor by tensor, as one process takes it; else each worker adds up the
    squares of its shards.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return torch.nn.utils.get_total_norm(gradients, foreach=True)
    if ordered:
        norms = torch.stack([torch.linalg.vector_norm(whole(gradient)) for gradient in gradients])
        total: Tensor = torch.linalg.vector_norm(norms)
        return total
    squares = torch.nn.utils.get_total_norm([g.to_local() for g in sharded], foreach=True).square()
    dist.all_reduce(squares)
    others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if others:
        squares += torch.nn.utils.get_total_norm(others, foreach=True).square()
    return squares.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients, in place, so that their norm, which is `norm` [], is at most max_norm."""
    parameters = list(parameters)
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
        return
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grads_with_norm_ has it
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every worker; all workers must call it. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """`tensors` on the CPU with the shards of all workers put together, one after the other; {} unless `keep`.

    All workers must call it; usually only the first keeps the result.
    """
    gathered = {}
    for name, tensor in tensors.items():
        together = whole(tensor.detach())
        if keep:
            gathered[name] = together.cpu().contiguous()
    return gathered
