"""The loss in chunks is the loss of full logits: value, gradients, z-loss, autocast; and its memory stays small."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.costs import FULL_LOGITS_BYTES, logits_chunk
from lazypipe.model.loss import Losses, losses_in_chunks, losses_of_logits, next_token_losses
from lazypipe.pipeline.bench import loss as loss_bench
from lazypipe.stages.contract import UserError
from tests.model.peak_memory import needs_linux, peak_mib
from tests.model.tiny_model import VOCAB, awake, some_tokens, tiny

N, V, D = 23, 61, 16


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype)
    matrix = torch.randn(V, D, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), matrix.requires_grad_(), torch.randint(V, (N,), generator=generator)


def by_hand(hidden: Tensor, matrix: Tensor, targets: Tensor, reduction: str, z_loss: float) -> Losses:
    """The definition, from the exponentials."""
    logits = hidden @ matrix.T
    log_z = logits.exp().sum(1).log()
    each, squares = log_z - logits[range(N), targets], log_z**2
    if reduction != "none":
        each, squares = (getattr(x, reduction)() for x in (each, squares))
    return Losses(each + z_loss * squares, each, squares if z_loss else torch.zeros_like(squares))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("chunk", [1, 7, N, N + 5, None])
def test_value_and_gradients_are_the_definition(chunk: int | None, z_loss: float, reduction: str) -> None:
    """In float64 to 1e-12; without a chunk, of the path with full logits."""
    hidden, matrix, targets = problem()
    expected = by_hand(hidden, matrix, targets, reduction, z_loss)
    gradients = torch.autograd.grad(3 * expected.objective, (hidden, matrix))
    if chunk is None:
        found = losses_of_logits(hidden @ matrix.T, targets, reduction, z_loss)
    else:
        found = losses_in_chunks(hidden, matrix, targets, chunk, reduction, z_loss)
    assert not found.cross_entropy.requires_grad and not found.log_z_squared.requires_grad
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12, check_stride=False)
    for one, two in zip(torch.autograd.grad(3 * found.objective, (hidden, matrix)), gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_gradient_every_reduction_is_the_definition(reduction: str) -> None:
    hidden, matrix, targets = problem()
    with torch.no_grad():
        found = losses_in_chunks(hidden, matrix, targets, 7, reduction, 0.03)
        for one, two in zip(found, by_hand(hidden, matrix, targets, reduction, 0.03), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="reduction is 'none' and a gradient is asked for"):
        losses_in_chunks(hidden, matrix, targets, 7, "none")


def test_it_is_torchs_own_chunked_loss() -> None:
    hidden, matrix, targets = problem()
    options = torch.nn.LinearCrossEntropyOptions()
    expected = F.linear_cross_entropy(hidden, matrix, targets, options=options)
    found = losses_in_chunks(hidden, matrix, targets, 7).objective
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = (torch.autograd.grad(loss, (hidden, matrix)) for loss in (found, expected))
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("borders", [None, [0, 5, 12, 13, 24]])
@pytest.mark.parametrize("half", [False, True])
def test_a_model_learns_the_same(half: bool, borders: list[int] | None, tied: bool, z_loss: float) -> None:
    """Gradients of every parameter, beside those of full logits; under autocast to bfloat16's rounding."""
    model = awake(tiny("lazy", tie_embeddings=tied)).train()
    windows = some_tokens(2, 13)
    packed = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    found = {}
    for chunk in (7, 24):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = next_token_losses(model, windows, cu_seqlens=packed, chunk_tokens=chunk, z_loss=z_loss)
        assert losses.objective.dtype == torch.float32
        losses.objective.backward()
        found[chunk] = losses, {name: parameter.grad for name, parameter in model.named_parameters()}
    (few, some), (all_at_once, expected) = found.values()
    tolerance = 2e-2 if half else 1e-5
    torch.testing.assert_close(few.cross_entropy, all_at_once.cross_entropy, rtol=1e-5, atol=1e-6)
    for name, gradient in some.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name


def test_small_logits_are_formed_at_once() -> None:
    """So runs of small models keep their numbers bit for bit."""
    assert logits_chunk(8 * 256, 2048) == 8 * 256
    tokens = FULL_LOGITS_BYTES // (4 * 50_304)
    assert logits_chunk(tokens, 50_304) == tokens
    assert logits_chunk(8 * 2048, 50_304) == 667
    assert logits_chunk(10**6, 10**9) == 1
    model, windows = awake(tiny("standard")), some_tokens(2, 13)
    logits = model(windows[:, :-1]).flatten(0, 1)
    full = F.cross_entropy(logits, windows[:, 1:].flatten())
    assert torch.equal(next_token_losses(model, windows).objective, full)
    assert math.isclose(full.item(), math.log(VOCAB), rel_tol=0.5)


def loss_of_many(chunk_tokens: int | None) -> Callable[[], None]:
    """The loss of 4096 tokens over 16,384 entries, and its gradients."""
    hidden, matrix = torch.randn(4096, 64, requires_grad=True), torch.randn(16_384, 64, requires_grad=True)
    targets = torch.randint(16_384, (4096,))

    def work() -> None:
        if chunk_tokens is None:
            losses = losses_of_logits(F.linear(hidden, matrix), targets)
        else:
            losses = losses_in_chunks(hidden, matrix, targets, chunk_tokens)
        losses.objective.backward()

    return work


@needs_linux
def test_peak_memory_is_that_of_a_chunk() -> None:
    """Full logits: 256 MiB, three times; chunks of 256 tokens: 16 MiB, twice, the gradients, and torch's own code."""
    assert peak_mib(loss_of_many, None) > 700
    assert peak_mib(loss_of_many, 256) < 150


def test_the_benchmark_times_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    loss_bench.main(
        ["--tokens", "16", "--vocab-size", "300", "--channels", "8", "--chunk-tokens", "8", "--repeats", "1"]
    )
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "16",
        "full",
        "chunks",
        "linear_cross_entropy",
    ]
    with pytest.raises(UserError, match="--repeats 0: must be at least 1"):
        loss_bench.main(["--repeats", "0"])
