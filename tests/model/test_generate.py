"""Continuations against the full forward pass."""

import pytest
import torch

from model.config import MIXERS, ModelConfig
from model.generate import generate
from model.transformer import Transformer
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
