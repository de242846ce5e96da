"""Compiled blocks give the gradients of plain ones, whatever the mixer, and few graphs are compiled for that.

`aot_eager` traces and partitions as `inductor` does and generates no code, so that a case takes a second. What
`inductor` generates is tested in tests/stages/pretrain/test_compiled_training.py.
"""

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lazypipe.model.mixers.registry import MIXERS
from tests.model.test_activation_checkpointing import gradients
from tests.model.tiny_model import awake, tiny

QUICK = ("standard", "lazy", "elliptical", "random_qk")
BORDERS = torch.tensor([0, 5, 12, 13, 24], dtype=torch.int32)


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


def assert_gradients_of_compiled_blocks(mixer: str, mode: Any, borders: Tensor | None) -> None:
    model = awake(tiny(mixer, num_layers=4, pattern="uniform" if mixer == "sink" else "even")).train()
    model.prepare_training(mode)
    expected = gradients(model, borders)
    counter = CompileCounterWithBackend("aot_eager")
    model.prepare_training(mode, counter)
    found = gradients(model, borders)
    # In a checkpoint torch compiles all or nothing, and what takes documents apart in Python is not for it. The side
    # sequence of random_qk and text_qk is one document.
    compiled = borders is None or mode == "none" or mixer in ("lazy", "mlp", "random_qk", "text_qk")
    assert bool(counter.frame_count) == compiled
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        difference = (gradient - expected[name]).norm()
        assert difference <= 1e-5 * expected[name].norm() + 1e-7, (name, difference)


@pytest.mark.parametrize("borders", [None, BORDERS], ids=["rows", "documents"])
@pytest.mark.parametrize("mixer", QUICK)
def test_gradients(mixer: str, borders: Tensor | None) -> None:
    """Mixers that read the layer below, a side sequence and nothing, in hybrids with standard attention."""
    assert_gradients_of_compiled_blocks(mixer, "none", borders)


@pytest.mark.parametrize("mode", ["block", "selective"])
@pytest.mark.parametrize("mixer", ["standard", "lazy"])
def test_gradients_with_activation_checkpointing(mixer: str, mode: str) -> None:
    assert_gradients_of_compiled_blocks(mixer, mode, None)


@pytest.mark.long
@pytest.mark.parametrize("borders", [None, BORDERS], ids=["rows", "documents"])
@pytest.mark.parametrize("mode", ["none", "block", "selective"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_of_every_mixer(mixer: str, mode: str, borders: Tensor | None) -> None:
    assert_gradients_of_compiled_blocks(mixer, mode, borders)


@pytest.mark.parametrize(("mixer", "graphs"), [("standard", 4), ("lazy", 2), ("mlp", 1), ("gating", 4), ("sink", 6)])
def test_blocks_share_their_graphs_and_documents_of_any_length_do_too(mixer: str, graphs: int) -> None:
    """One kind of block is one graph; where attention takes documents apart, one before and one after it. Each may be
    compiled a second time, for any number of documents. Beyond eight, torch would go on without compiling."""
    model = awake(tiny(mixer, num_layers=6)).train()
    counter = CompileCounterWithBackend("aot_eager")
    for mode in ("none", "block", "selective"):
        torch._dynamo.reset()
        counter.frame_count = 0
        model.prepare_training(mode, counter)
        gradients(model)
        assert counter.frame_count == 1, mode
    model.prepare_training(compiler=counter)
    torch._dynamo.reset()
    counter.frame_count = 0
    drawn = random.Random(0)
    for _ in range(10):
        cuts = sorted(drawn.sample(range(1, 24), drawn.randint(1, 5)))
        gradients(model, torch.tensor([0, *cuts, 24], dtype=torch.int32))
    assert counter.frame_count <= graphs


def test_passes_without_gradient_and_decoding_stay_as_they_are() -> None:
    model = awake(tiny("lazy"))
    counter = CompileCounterWithBackend("aot_eager")
    model.prepare_training(compiler=counter)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        model(tokens)
        model.statistics_by_layer(tokens)
    model(tokens, model.new_cache(8))
    assert counter.frame_count == 0


def test_a_copy_trains_its_own_blocks_and_compiling_can_be_undone() -> None:
    model = awake(tiny("lazy")).train()
    model.prepare_training(compiler="aot_eager")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    found = gradients(copied)
    assert len(found) == 1 + len(list(model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
    counter = CompileCounterWithBackend("aot_eager")
    model.prepare_training(compiler=counter)
    model.prepare_training()
    gradients(model)
    assert counter.frame_count == 0
