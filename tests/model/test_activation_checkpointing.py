"""Checkpointed blocks give the same gradients bit for bit, and keep less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lazypipe.model.config import ModelConfig
from lazypipe.model.costs import training_memory
from lazypipe.model.loss import next_token_losses
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.transformer import Transformer
from tests.model.peak_memory import needs_linux, peak_mib
from tests.model.tiny_model import awake, some_tokens, tiny

MODES: tuple[Any, ...] = ("block", "selective")


def gradients(model: Transformer, borders: Tensor | None = None, half: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    sink = model.config.mixer == "sink"
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = next_token_losses(model, some_tokens(2, 13), cu_seqlens=borders, with_head_balance=sink)
        loss = losses.objective if losses.head_balance is None else losses.objective + 0.1 * losses.head_balance
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", ["uniform", "even"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_are_the_same_to_the_bit(mixer: str, pattern: str, packed: bool) -> None:
    """Mixers that read the layer below, the embeddings or a side sequence, and head masses, included."""
    model = awake(tiny(mixer, num_layers=4, pattern=pattern if mixer != "sink" else "uniform")).train()
    borders = torch.tensor([0, 5, 12, 13, 24], dtype=torch.int32) if packed else None
    expected = gradients(model, borders)
    for mode in MODES:
        model.prepare_training(mode)
        found = gradients(model, borders)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), (mode, name)


@pytest.mark.parametrize("mixer", ["standard", "lazy"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same_under_autocast(mode: Any, mixer: str) -> None:
    model = awake(tiny(mixer)).train()
    expected = gradients(model, half=True)
    model.prepare_training(mode)
    for name, gradient in gradients(model, half=True).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize(("mode", "products"), [("none", 0), ("block", 6), ("selective", 0)])
def test_selective_repeats_no_product_with_weights(mode: Any, products: int) -> None:
    """Of 7 per block (q, k, v, o; gate, up, down) 6, as nobody asks for the last; and two each in any backward pass."""
    model = awake(tiny("standard")).train()
    counted = 0

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal counted
            counted += func is torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    model.prepare_training(mode)
    loss = next_token_losses(model, some_tokens(2, 13)).objective
    with Counter():
        loss.backward()
    assert counted == 2 * (7 * model.config.num_layers + 1) + products * model.config.num_layers


SHAPE = {"hidden_size": 128, "num_layers": 8, "num_heads": 4, "max_seq_len": 256, "max_bias_length": 64}
ROWS, LENGTH, VOCAB = 16, 256, 64


def training_pass(mixer: str, mode: Any) -> Callable[[], None]:
    model = Transformer(ModelConfig.model_validate({**SHAPE, "mixer": mixer}), VOCAB)
    model.prepare_training(mode)
    windows = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    next_token_losses(model, windows[:1]).objective.backward()  # torch's code and buffers
    return lambda: next_token_losses(model, windows).objective.backward()


@pytest.mark.long
@needs_linux
def test_peak_memory_falls_as_estimated() -> None:
    config = ModelConfig.model_validate({**SHAPE, "mixer": "standard"})
    peaks = []
    for mode in ("none", "selective", "block"):
        memory = training_memory(config, VOCAB, LENGTH, ROWS, "float32", activation_checkpointing=mode)
        estimate = (memory.activations + memory.logits) / 2**20
        peaks.append(peak_mib(training_pass, "standard", mode))
        assert 0.5 * estimate < peaks[-1] < 1.05 * estimate
    none, selective, block = peaks
    assert block < 0.3 * none
    assert block < selective < 0.8 * none
