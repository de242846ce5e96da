"""The MLP in the place of attention: its formula, its width, and that no position hears of another."""

import torch

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.mlp import MlpMixer
from lazypipe.model.rope import rope_tables
from tests.model.tiny_model import awake, some_tokens, tiny


@torch.no_grad()
def test_each_position_is_the_gated_mlp_of_itself() -> None:
    mixer = awake(tiny("mlp")).layers[1].mixer
    assert isinstance(mixer, MlpMixer)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    gate, up, down = (one.weight.double() for one in (mixer.gate_proj, mixer.up_proj, mixer.down_proj))
    out = mixer(x, BlockInputs(rope_tables(0, 5, 8, 10_000.0, x.device))).x
    for b in range(2):
        for i in range(5):
            opened = gate @ x[b, i].double()
            expected = down @ (opened / (1 + torch.exp(-opened)) * (up @ x[b, i].double()))
            torch.testing.assert_close(out[b, i].double(), expected, atol=1e-4, rtol=1e-4)


def test_the_width_is_four_thirds_of_hidden_rounded_to_one() -> None:
    widths = {hidden: ModelConfig(hidden_size=hidden).mlp_mixer_size for hidden in (512, 768, 896, 2048)}
    assert widths == {512: 683, 768: 1024, 896: 1195, 2048: 2731}
    for hidden, width in widths.items():
        assert abs(3 * hidden * width - 4 * hidden**2) <= hidden
    assert ModelConfig(hidden_size=128, num_heads=4, num_kv_heads=1).mlp_mixer_size == 107  # 2 (128 + 32) / 3


@torch.no_grad()
def test_a_token_is_answered_alike_in_every_context() -> None:
    model = awake(tiny("mlp"))
    tokens = some_tokens(1, 12)
    torch.testing.assert_close(model(tokens)[0], model(tokens.T)[:, 0], atol=1e-5, rtol=1e-5)
    assert model.attention_layers == [] and list(model.attention_rows(tokens, 4)) == []
    assert awake(tiny("mlp", pattern=[2])).attention_layers == [1]
