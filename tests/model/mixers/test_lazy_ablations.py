"""Lazy Attention with a part taken away: each ablation against its definition, and what is left to learn."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lazypipe.model.config import ModelConfig, parameter_count
from lazypipe.model.mixers import query_blocks
from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.mixers.lazy import LazyAttention
from lazypipe.model.transformer import Transformer, count_parameters
from lazypipe.stages.pretrain.optimizer import split_parameters
from tests.model.oracles import agrees_with
from tests.model.test_transformer import SIZES, model_of_size
from tests.model.tiny_model import VOCAB, awake, some_tokens, sparsity_by_layer, tiny

CONSTANT: dict[str, Any] = {"lazy_threshold": "constant", "tau_init": -0.1}
ABLATIONS: dict[str, dict[str, Any]] = {
    "no_bias": {"lazy_bias": False},
    "no_rope": {"lazy_rope": False},
    "no_elastic": {"lazy_elastic": False},
    "one_tau": {"lazy_tau_scope": "layer"},
    "constant": CONSTANT,
    "one_constant": {**CONSTANT, "lazy_tau_scope": "layer"},
    "constant_no_bias": {**CONSTANT, "lazy_bias": False},
    "bare": {"lazy_bias": False, "lazy_rope": False, "lazy_elastic": False},
}
ADDED = {  # parameters per layer beside those of standard attention: 4 heads, W = 8
    "no_bias": 4,
    "no_rope": 36,
    "no_elastic": 32,
    "one_tau": 33,
    "constant": 36,
    "one_constant": 33,
    "constant_no_bias": 4,
    "bare": 0,
}


def mixer_of(kernel: str = "blockwise", **fields: object) -> LazyAttention:
    """W = 5, tau of both signs (constant: within the range of weights), a bias of a few units."""
    shape = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "mixer": "lazy", "max_bias_length": 5}
    mixer = LazyAttention(ModelConfig.model_validate({**shape, **fields}))
    mixer.kernel = kernel
    with torch.no_grad():
        if mixer.bias is not None:
            mixer.bias.copy_(torch.randn(4, 5, generator=torch.Generator().manual_seed(7)) * 2)
        if mixer.tau is not None:
            taus = torch.tensor([-0.83, -0.31, 0.27, -1.4])[: len(mixer.tau)]
            mixer.tau.copy_(taus if mixer.relative else 0.2 * taus)
    return mixer


@pytest.mark.parametrize("kernel", ["blockwise", "reference"])
@pytest.mark.parametrize(("query_len", "key_len"), [(11, 11), (1, 11), (4, 11)])
@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_its_definition(name: str, query_len: int, key_len: int, kernel: str) -> None:
    mixer = mixer_of(kernel, **ABLATIONS[name])
    learned = tuple(one for one in (mixer.bias, mixer.tau) if one is not None)

    def row(scores: Tensor, head: int) -> Tensor:
        seen = len(scores)
        if mixer.bias is not None:
            own = mixer.bias[head].double()
            scores = scores + torch.stack([own[seen - 1 - j] if seen - 1 - j < 5 else 0 * own[0] for j in range(seen)])
        weights = scores.exp() / scores.exp().sum()
        if mixer.tau is None:
            return weights
        tau = mixer.tau[head if len(mixer.tau) == 4 else 0].double()
        return (weights + (tau if "constant" in name else tau / seen)).clamp(min=0)

    agrees_with(mixer, row, query_len, key_len, learned)


@pytest.mark.parametrize("name", ABLATIONS)
def test_it_learns_what_is_left_and_counts_it(name: str) -> None:
    config = tiny("lazy", **ABLATIONS[name])
    model = Transformer(config, VOCAB)
    standard, _ = count_parameters(Transformer(tiny("standard"), VOCAB))
    assert count_parameters(model)[0] == parameter_count(config, VOCAB) == standard + 2 * ADDED[name]
    learned = {leaf for leaf in ("tau", "bias") if getattr(model.layers[0].mixer, leaf) is not None}
    assert {f"layers.0.mixer.{leaf}" for leaf in learned} <= set(split_parameters(model)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(some_tokens(2, 20)).square().mean().backward()
    for leaf in learned:
        gradient = model.layers[1].mixer.get_parameter(leaf).grad
        assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0
    # The rest starts as in the full model: curves of ablations differ by the ablation alone.
    full = Transformer(tiny("lazy"), VOCAB).state_dict()
    for key, tensor in model.state_dict().items():
        if not key.endswith("tau"):
            assert torch.equal(tensor, full[key]), key


def test_counts_at_the_papers_sizes() -> None:
    for size, (*_, tied, _, adds) in SIZES.items():
        config, vocab = model_of_size(size, "lazy", True)
        layers, heads = config.num_layers, config.num_heads
        expected = {
            "no_bias": layers * heads,
            "no_rope": adds,
            "no_elastic": adds - layers * heads,
            "constant": adds,
            "one_tau": adds - layers * (heads - 1),
            "bare": 0,
            "constant_no_bias": layers * heads,
            "one_constant": adds - layers * (heads - 1),
        }
        for name, fields in ABLATIONS.items():
            ablated = ModelConfig.model_validate({**config.model_dump(), **fields})
            with torch.device("meta"):
                counted, _ = count_parameters(Transformer(ablated, vocab))
            assert counted == parameter_count(ablated, vocab) == tied + expected[name], (size, name)
            assert counted - tied < 1e-3 * tied


@pytest.mark.parametrize("pattern", ["uniform", [1]], ids=str)
@pytest.mark.parametrize("name", ABLATIONS)
def test_decoding_rows_and_sparsity_agree_with_the_forward_pass(name: str, pattern: object) -> None:
    model = awake(tiny("lazy", num_kv_heads=2, pattern=pattern, **ABLATIONS[name]))
    tokens = some_tokens(2, 21)
    with torch.no_grad():
        full = model(tokens)
        for pieces in ([1] * 21, [5, 1, 15]):
            cache = model.new_cache(21)
            parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)
    lower = torch.ones(21, 21).tril().bool()
    zeros: dict[int, list[Tensor]] = {}
    for layer, start, weights in model.attention_rows(tokens, 8):
        seen = lower[start : start + weights.shape[2]]
        zeros.setdefault(layer, []).append((weights == 0)[..., seen].float().flatten())
        assert (weights[..., ~seen] == 0).all()
    counted = [float(torch.cat(zeros[layer]).mean()) for layer in (0, 1)]
    shares = sparsity_by_layer(model, tokens)
    if "lazy_elastic" in ABLATIONS[name]:
        assert shares is None and max(counted) == 0
    else:
        assert shares is not None
        for layer, mixer in enumerate(model.config.layer_mixers):
            if mixer == "standard":
                assert shares[layer] is None and counted[layer] == 0
            else:
                assert shares[layer] == pytest.approx(counted[layer], abs=2e-3) and counted[layer] > 0.05


def test_without_rope_nothing_is_rotated_and_without_either_position_is_lost() -> None:
    mixer = awake(tiny("lazy", lazy_rope=False)).layers[0].mixer
    x = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
    inputs = BlockInputs((torch.full((10, 8), torch.nan), torch.full((10, 8), torch.nan)))
    order = torch.tensor([3, 1, 0, 2, 5, 4, 8, 7, 6, 9])
    bare = awake(tiny("lazy", **ABLATIONS["bare"])).layers[0].mixer
    with torch.no_grad():
        assert mixer(x, inputs).x.isfinite().all()
        assert not torch.allclose(mixer(x, inputs).x[:, 9], mixer(x[:, order], inputs).x[:, 9], atol=1e-3)
        torch.testing.assert_close(bare(x, inputs).x[:, 9], bare(x[:, order], inputs).x[:, 9])


def test_a_constant_threshold_keeps_one_block_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_blocks, "QUERY_ROWS", 16)
    mixer = mixer_of(**CONSTANT)
    shapes = ((4, 128, 8), (2, 128, 8), (2, 128, 8))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, *shape, generator=generator).requires_grad_() for shape in shapes)
    largest = 0

    def record(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        mixer.attend(q, k, v)
    assert largest <= 4 * 128 * 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lazy_elastic": False, "lazy_threshold": "constant"}, r"lazy_threshold=constant says something about tau"),
        ({"lazy_elastic": False, "lazy_tau_scope": "layer"}, r"lazy_tau_scope=layer .* lazy_elastic=false has none"),
        ({"lazy_threshold": "constant"}, r"tau_init=-1 .* cuts every weight .* above -1, e\.g\. -0\.031 \(-1 / max"),
    ],
)
def test_switches_that_contradict_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny("lazy", **fields)
    tiny("lazy", **{**fields, "lazy_elastic": True, "tau_init": -0.5})
