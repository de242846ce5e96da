"""Linear distance biases against their definition, and the published slopes."""

import pytest
import torch
from torch import Tensor

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.alibi import AlibiAttention, alibi_slopes
from lazypipe.model.mixers.base import BlockInputs
from tests.model.oracles import agrees_with
from tests.model.tiny_model import awake, tiny

CONFIG = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize(("query_len", "key_len"), [(9, 9), (1, 9), (4, 9)])
def test_alibi_is_its_definition(query_len: int, key_len: int) -> None:
    def row(scores: Tensor, head: int) -> Tensor:
        slope = (1 / 4, 1 / 16, 1 / 64, 1 / 256)[head]
        own = len(scores) - 1
        penalised = [(score - slope * (own - key)).exp() for key, score in enumerate(scores)]
        return torch.stack(penalised) / sum(penalised)

    agrees_with(AlibiAttention(CONFIG), row, query_len, key_len)


def test_the_slopes_are_the_published_ones() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    sixteen = [2.0 ** (-h / 2) for h in range(1, 17)]
    assert alibi_slopes(16) == sixteen
    assert alibi_slopes(12) == [*alibi_slopes(8), *sixteen[0:8:2]]
    for heads in range(1, 33):
        assert len(set(alibi_slopes(heads))) == heads


def test_nothing_is_rotated() -> None:
    """The same vector at every position: scores are equal, so only the distance is left to order the weights."""
    mixer = awake(tiny("alibi")).layers[0].mixer
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)).expand(1, 10, 32)
    rope = (torch.full((10, 8), torch.nan), torch.full((10, 8), torch.nan))
    with torch.no_grad():
        (_, weights), *_ = mixer.attention_rows(x, BlockInputs(rope), 10)
        assert mixer(x, BlockInputs(rope)).x.isfinite().all()
    ratios = weights[0, :, 9, 1:] / weights[0, :, 9, :-1]
    expected = torch.tensor(alibi_slopes(4)).exp()[:, None].expand(4, 9)
    torch.testing.assert_close(ratios, expected, rtol=1e-4, atol=0)
