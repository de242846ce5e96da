"""Continuations against the full forward pass."""

from typing import Any

import pytest
import torch

from lazypipe.model.config import ModelConfig
from lazypipe.model.generate import generate, generate_all, nucleus, steps
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.transformer import Transformer
from tests.model.tiny_model import with_side_text

VOCAB = 23


def model_of(mixer: str) -> Transformer:
    """Random weights ten times their usual size: logits far enough apart for an argmax that rounding cannot move."""
    config = ModelConfig.model_validate(
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mixer": mixer, "max_bias_length": 4, "init_std": 0.2}
    )
    return with_side_text(Transformer(config, VOCAB)).eval()


PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_takes_the_argmax_of_the_full_forward(mixer: str) -> None:
    model = model_of(mixer)
    expected = PROMPT
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, PROMPT, 12), expected)


def test_sampling_is_seeded_and_leaves_the_global_state_alone() -> None:
    model = model_of("standard")
    before = torch.get_rng_state()

    def sample(seed: int) -> list[list[int]]:
        return generate(model, PROMPT, 12, 1.0, 10, torch.Generator().manual_seed(seed)).tolist()

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"needs a torch\.Generator"):
        generate(model, PROMPT, 1, temperature=1.0)


def test_sampled_frequencies_are_the_softmax_over_the_top_k() -> None:
    model = model_of("standard")
    draws = 4000
    prompt = PROMPT[:1].expand(draws, -1)
    drawn = generate(model, prompt, 1, 0.7, 5, torch.Generator().manual_seed(0))[:, -1]
    with torch.no_grad():
        logits = model(PROMPT[:1])[0, -1]
    top, ids = logits.topk(5)
    expected = torch.zeros(VOCAB).scatter(0, ids, torch.softmax(top / 0.7, -1))
    found = torch.bincount(drawn, minlength=VOCAB) / draws
    assert float(found[expected == 0].sum()) == 0
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)  # 4 standard errors
    assert torch.equal(generate(model, PROMPT, 5, 0.7, 1, torch.Generator()), generate(model, PROMPT, 5))


def test_a_stopped_row_repeats_the_stop_token_and_all_stopped_ends() -> None:
    model = model_of("lazy")
    free = generate(model, PROMPT, 10)
    stop = int(free[0, 4])
    stopped = generate(model, PROMPT[:1], 10, stop_token=stop)
    first = free[0, 3:].tolist().index(stop)
    assert stopped[0].tolist() == free[0, : 4 + first].tolist()
    both = generate(model, PROMPT, 10, stop_token=stop)
    assert set(both[0, 4 + first :].tolist()) <= {stop}
    if stop not in free[1, 3:]:
        assert torch.equal(both[1], free[1])


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no position to continue from"):
        generate(model_of("standard"), torch.zeros(1, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_without_the_cache_the_tokens_are_the_same(mixer: str) -> None:
    model = model_of(mixer)
    assert torch.equal(generate(model, PROMPT, 12, use_cache=False), generate(model, PROMPT, 12))


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(5, None, 0.7), (None, 0.6, 1.3), (6, 0.8, 1.0)])
def test_drawn_frequencies_pass_a_chi_square_test(top_k: int | None, top_p: float | None, temperature: float) -> None:
    """20,000 draws against probabilities in float64 by another route: sorted in Python, added up until p is reached."""
    model = model_of("standard")
    draws = 20_000
    prompt = PROMPT[:1].expand(draws, -1)
    drawn = generate(model, prompt, 1, temperature, top_k, torch.Generator().manual_seed(3), top_p=top_p)[:, -1]
    with torch.no_grad():
        weights = torch.exp(model(PROMPT[:1])[0, -1].double() / temperature).tolist()
    kept = sorted(range(VOCAB), key=lambda token: -weights[token])[: top_k or VOCAB]
    mass = sum(weights[token] for token in kept)
    nucleus: list[int] = []
    for token in kept:
        nucleus.append(token)
        if sum(weights[t] for t in nucleus) / mass >= (top_p or 1.0):
            break
    assert 1 < len(nucleus) <= len(kept) and (top_p is None or len(nucleus) < len(kept))
    found = torch.bincount(drawn, minlength=VOCAB).tolist()
    assert sum(found[token] for token in nucleus) == draws
    expected = {token: draws * weights[token] / sum(weights[t] for t in nucleus) for token in nucleus}
    statistic = sum((found[token] - expected[token]) ** 2 / expected[token] for token in nucleus)
    # Mean k and variance 2 k at k degrees of freedom: five standard deviations above.
    freedom = len(nucleus) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_the_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    rows = torch.softmax(3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0)), -1).sort(
        descending=True
    )[0]
    for top_p in (0.05, 0.5, 0.9, 0.999):
        kept = nucleus(rows, top_p)
        for row, full in zip(kept.double(), rows.double(), strict=True):
            count = int((row > 0).sum())
            assert torch.equal(row[:count], full[:count]) and not row[count:].any()
            assert full[:count].sum() >= top_p - 1e-12
            assert count == 1 or full[: count - 1].sum() < top_p
    exact = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert nucleus(exact, 0.5).tolist() == [[0.5, 0, 0, 0]] and nucleus(exact, 0.75).tolist() == [[0.5, 0.25, 0, 0]]


@pytest.mark.parametrize("mixer", ["standard", "lazy", "gating", "random_qk"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_all_lengths_together_or_one_by_one(mixer: str, temperature: float) -> None:
    model = model_of(mixer)
    prompts = [[3, 1, 4], [1], [5, 9, 2], [6, 5], [3, 5, 8], [9], [7, 9, 3, 2, 3]]
    seeds = list(range(len(prompts)))
    stop = generate_all(model, [prompts[0]], 12, temperature, 8, seeds[:1])[0][5]
    before = torch.get_rng_state()
    together = generate_all(model, prompts, 12, temperature, 8, seeds, stop, 0.95, batch_size=2)
    assert torch.equal(before, torch.get_rng_state())
    for prompt, seed, found in zip(prompts, seeds, together, strict=True):
        draw = torch.Generator().manual_seed(seed)
        alone = generate(model, torch.tensor([prompt]), 12, temperature, 8, draw, stop, 0.95)[0].tolist()
        assert found == alone[len(prompt) :]
        assert stop not in found[:-1]
    assert together[0][-1] == stop and len({len(found) for found in together}) > 1


def test_steps_come_one_by_one() -> None:
    model = model_of("lazy")
    come = []
    for one in steps(model, PROMPT, 5):
        assert one.shape == (2, 1)
        come.append(one)
    assert torch.equal(torch.cat([PROMPT, *come], 1), generate(model, PROMPT, 5))


def test_a_tiny_temperature_is_greedy() -> None:
    model = model_of("standard")
    assert torch.equal(generate(model, PROMPT, 5, 1e-45, generator=torch.Generator()), generate(model, PROMPT, 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.5}, r"temperature=-0\.5 is not in \[0, inf\)"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0 leaves no token"),
        ({"top_p": 0.0}, r"top_p=0\.0 is not in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"temperature": 1.0, "generator": [torch.Generator()]}, "1 generators for 2 rows"),
    ],
)
def test_settings_out_of_range_are_refused_before_the_first_token(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(steps(model_of("standard"), PROMPT, 1, **fields))
