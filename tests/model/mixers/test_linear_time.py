"""Taylor and gating: training work that grows with the length, and a decoding step that does not grow."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lazypipe.model.cache import RecurrentState
from lazypipe.model.mixers.base import BlockInputs, TokenMixer
from lazypipe.model.rope import rope_tables
from tests.model.tiny_model import awake, tiny


class Written(TorchDispatchMode):
    """Counts the numbers that all operations write, views left out."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not any(alias.alias_info and not alias.alias_info.is_write for alias in function._schema.returns):
            tensors = out if isinstance(out, tuple | list) else (out,)
            self.numbers += sum(one.numel() for one in tensors if isinstance(one, torch.Tensor))
        return out


def mixer_of(name: str) -> TokenMixer:
    mixer = awake(tiny(name)).layers[0].mixer
    assert isinstance(mixer, TokenMixer)
    return mixer


def work(mixer: TokenMixer, length: int) -> tuple[int, int]:
    """(multiplications and additions of matrix products, numbers written) of one forward and backward pass."""
    x = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = BlockInputs(rope_tables(0, length, 8, 10_000.0, x.device))
    with FlopCounterMode(display=False) as flops, Written() as written:
        mixer(x, inputs).x.sum().backward()
    return flops.get_total_flops(), written.numbers


@pytest.mark.parametrize("name", ["taylor", "gating"])
def test_training_work_grows_with_the_length(name: str) -> None:
    short, long = work(mixer_of(name), 512), work(mixer_of(name), 1024)
    for one, other in zip(short, long, strict=True):
        assert 1.95 < other / one < 2.1
    # The same count sees what is quadratic.
    short, long = work(mixer_of("sigmoid"), 512), work(mixer_of("sigmoid"), 1024)
    assert long[0] > 2.5 * short[0] and long[1] > 2.5 * short[1]


@pytest.mark.parametrize("name", ["taylor", "gating"])
@torch.no_grad()
def test_a_decoding_step_costs_the_same_however_much_came_before(name: str) -> None:
    mixer = mixer_of(name)
    cache = mixer.new_cache(3000)
    assert isinstance(cache, RecurrentState)
    costs, sizes = set(), set()
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    one = BlockInputs(rope_tables(0, 1, 8, 10_000.0, x.device))
    for before in (3, 40, 2000):
        long = BlockInputs(rope_tables(0, before, 8, 10_000.0, x.device))
        mixer(x.expand(1, before, 32), long, cache)
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors))
        with FlopCounterMode(display=False) as flops, Written() as written:
            mixer(x, one, cache)
        costs.add((flops.get_total_flops(), written.numbers))
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors))
    assert len(costs) == len(sizes) == 1
    # float32: 45 features x 9, or a maximum and 9 sums, for each of 4 heads; not those of the 2000 tokens before.
    assert sizes.pop() == 4 * 4 * (45 * 9 if name == "taylor" else 1 + 9)
