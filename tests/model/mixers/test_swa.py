"""Sliding windows against their definition, with and without sink tokens, in one block and in several."""

import pytest
import torch
from torch import Tensor

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers import swa
from lazypipe.model.mixers.swa import SlidingWindowAttention
from tests.model.oracles import agrees_with
from tests.model.tiny_model import awake, some_tokens, sparsity_by_layer, tiny


def mixer_of(window: int, sinks: int) -> SlidingWindowAttention:
    fields = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "swa_window": window, "swa_sink_tokens": sinks}
    return SlidingWindowAttention(ModelConfig.model_validate(fields))


@pytest.mark.parametrize("block", [3, 256])
@pytest.mark.parametrize(("query_len", "key_len"), [(13, 13), (1, 13), (6, 13)])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (4, 2), (2, 6), (20, 3)])
def test_swa_is_its_definition(
    monkeypatch: pytest.MonkeyPatch, window: int, sinks: int, query_len: int, key_len: int, block: int
) -> None:
    monkeypatch.setattr(swa, "QUERY_ROWS", block)

    def row(scores: Tensor, _: int) -> Tensor:
        own = len(scores) - 1
        seen = [own - key < window or key < sinks for key in range(len(scores))]
        terms = [score.exp() if visible else 0 * score for score, visible in zip(scores, seen, strict=True)]
        return torch.stack(terms) / sum(terms)

    agrees_with(mixer_of(window, sinks), row, query_len, key_len)


def test_keys_outside_the_window_are_never_read() -> None:
    """NaN in what no query needs; the mask alone would let it through."""
    mixer = mixer_of(4, 2)
    q = torch.randn(1, 4, 1, 8, generator=torch.Generator().manual_seed(0))
    k, v = torch.randn(2, 1, 2, 300, 8, generator=torch.Generator().manual_seed(1))
    expected = mixer.attend(q, k, v)
    k[:, :, 2:296], v[:, :, 2:296] = torch.nan, torch.nan
    assert torch.equal(mixer.attend(q, k, v), expected) and expected.isfinite().all()


def test_a_window_as_long_as_the_text_is_standard_attention() -> None:
    tokens = some_tokens(2, 30)
    wide, standard = awake(tiny("swa", swa_window=30)), awake(tiny("standard"))
    narrow = awake(tiny("swa", swa_window=29))
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens), standard(tokens))
        torch.testing.assert_close(narrow(tokens)[:, :29], standard(tokens)[:, :29], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(narrow(tokens)[:, 29], standard(tokens)[:, 29], atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 3])
def test_decoding_beyond_the_window(sinks: int) -> None:
    model = awake(tiny("swa", swa_window=5, swa_sink_tokens=sinks, num_kv_heads=2))
    tokens = some_tokens(2, 24)
    with torch.no_grad():
        for pieces in ([1] * 24, [3, 9, 1, 11]):
            cache = model.new_cache(24)
            parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


def test_sparsity_is_the_share_outside_the_window() -> None:
    model = awake(tiny("swa", swa_window=6))
    outside = sum(max(0, position + 1 - 6) for position in range(20))
    assert sparsity_by_layer(model, some_tokens(2, 20)) == pytest.approx([outside / 210] * 2)
