"""The transformer: parameter counts, initialisation, causality, decoding and the weights it says it uses."""

from typing import Any

import pytest
import torch

from lazypipe.kernels import lazy_attention
from lazypipe.model.config import ModelConfig, parameter_count
from lazypipe.model.mixers.base import AttentionMixer, BlockInputs, build_mixer
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.rope import apply_rope, rope_tables
from lazypipe.model.transformer import Transformer, count_parameters
from tests.model.tiny_model import VOCAB, awake, some_tokens, sparsity_by_layer, tiny

# hidden, intermediate, layers, heads, q/k norm, vocabulary, non-embedding, tied, untied, what lazy adds at W = 512
SIZES = {
    "70M": (512, 2048, 6, 8, False, 50304, 25_172_480, 50_928_128, 76_683_776, 24_624),
    "160M": (768, 3072, 12, 12, False, 50304, 113_265_408, 151_898_880, 190_532_352, 73_872),
    "340M": (1024, 2816, 24, 16, False, 32000, 308_331_520, 341_099_520, 373_867_520, 196_992),
    "500M": (896, 4864, 24, 14, False, 50304, 390_900_608, 435_972_992, 481_045_376, 172_368),
    "760M": (1536, 4096, 24, 16, False, 32000, 679_552_512, 728_704_512, 777_856_512, 196_992),
    "1.7B": (2048, 6144, 28, 16, True, 50304, 1_526_850_560, 1_629_873_152, 1_732_895_744, 229_824),
}
NAMES: tuple[Any, ...] = tuple(MIXERS)
ATTENTION = [name for name in NAMES if isinstance(build_mixer(tiny("standard"), name), AttentionMixer)]


def model_of_size(size: str, mixer: str, tie: bool, pattern: str = "uniform") -> tuple[ModelConfig, int]:
    """A size of `SIZES` and its vocabulary."""
    hidden, intermediate, layers, heads, qk_norm, vocab, *_ = SIZES[size]
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_layers": layers, "num_heads": heads}
    fields = {"qk_norm": qk_norm, "tie_embeddings": tie, "mixer": mixer, "pattern": pattern}
    return ModelConfig.model_validate({**shape, **fields}), vocab


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_those_of_the_papers(size: str) -> None:
    body, tied, untied, lazy_adds = SIZES[size][6:]
    for tie, expected in ((True, tied), (False, untied)):
        for mixer, extra in (("standard", 0), ("lazy", lazy_adds)):
            config, vocab = model_of_size(size, mixer, tie)
            with torch.device("meta"):
                counted = count_parameters(Transformer(config, vocab))
            assert counted == (expected + extra, body + extra)
            assert parameter_count(config, vocab) == expected + extra


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_the_parameters_of_standard_attention(mixer: str) -> None:
    """Within 0.1 % of the model at every size, and exactly as many as planning says, also in a hybrid."""
    for size, (*_, tied, _, _) in SIZES.items():
        config, vocab = model_of_size(size, mixer, True)
        with torch.device("meta"):
            counted, _ = count_parameters(Transformer(config, vocab))
        assert counted == parameter_count(config, vocab)
        assert abs(counted - tied) < 1e-3 * tied, size
        hybrid, vocab = model_of_size(size, mixer, True, "even")
        assert parameter_count(hybrid, vocab) - tied == (counted - tied) / 2


@pytest.mark.parametrize("fields", [{"num_kv_heads": 2}, {"qk_norm": True}, {"pattern": [1]}], ids=str)
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_count_without_torch_holds_for_every_shape(mixer: str, fields: dict[str, object]) -> None:
    config = tiny(mixer, tie_embeddings=False, **fields)
    assert parameter_count(config, VOCAB) == count_parameters(Transformer(config, VOCAB))[0]


def test_variants_of_one_seed_start_from_the_same_weights() -> None:
    before = torch.get_rng_state()
    standard = Transformer(tiny("standard"), VOCAB, seed=3).state_dict()
    lazy = Transformer(tiny("lazy"), VOCAB, seed=3).state_dict()
    other = Transformer(tiny("standard"), VOCAB, seed=4).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert set(lazy) - set(standard) == {f"layers.{layer}.mixer.{name}" for layer in (0, 1) for name in ("tau", "bias")}
    for name, weight in standard.items():
        assert torch.equal(weight, lazy[name]), name
        assert name.endswith("norm.weight") or not torch.equal(weight, other[name]), name


def test_initial_scales() -> None:
    config = ModelConfig(hidden_size=256, num_layers=2, num_heads=4, mixer="lazy", max_bias_length=512)
    model = Transformer(config, 1000)
    first: Any
    second: Any
    first, second = (layer.mixer for layer in model.layers)
    torch.testing.assert_close(first.q_proj.weight.std(), torch.tensor(0.02), rtol=0.02, atol=0)
    torch.testing.assert_close(first.o_proj.weight.std(), torch.tensor(0.01), rtol=0.02, atol=0)
    torch.testing.assert_close(model.layers[0].mlp.down_proj.weight.std(), torch.tensor(0.01), rtol=0.02, atol=0)
    torch.testing.assert_close(first.bias.std(), torch.tensor(1e-3), rtol=0.1, atol=0)
    assert torch.equal(first.tau, torch.full((4,), -1.0))
    assert not torch.equal(first.q_proj.weight, first.k_proj.weight)
    assert not torch.equal(first.q_proj.weight, second.q_proj.weight)


def test_rope_scores_depend_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)
    tables = rope_tables(0, 50, 16, 10_000.0, torch.device("cpu"))

    def score(i: int, j: int) -> float:
        (q_cos, k_cos), (q_sin, k_sin) = ([table[p : p + 1] for p in (i, j)] for table in tables)
        return float((apply_rope(q, (q_cos, q_sin)) * apply_rope(k, (k_cos, k_sin))).sum())

    assert score(30, 13) == pytest.approx(score(17, 0), abs=1e-5)
    assert score(30, 13) != pytest.approx(score(30, 12), abs=1e-3)
    # The definition, pair (1, 9) of position 13: a plane rotation by 13 * theta^(-2/16).
    angle = 13 * 10_000 ** (-2 / 16)
    cos, sin = (table[13:14] for table in tables)
    rotated = apply_rope(k, (cos, sin)).flatten()
    plane = torch.tensor(complex(*k.flatten()[[1, 9]].tolist())) * torch.polar(torch.ones(()), torch.tensor(angle))
    torch.testing.assert_close(rotated[[1, 9]], torch.view_as_real(plane))


@pytest.mark.parametrize("mixer", [name for name, row in MIXERS.items() if row.has_weights])
def test_attention_rows_are_the_weights_the_layer_multiplies_with_v(mixer: str) -> None:
    model = awake(tiny(mixer, num_kv_heads=2))
    tokens = some_tokens(2, 21)
    rows: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for number, start, weights in model.attention_rows(tokens, query_block=8):
        assert start == 8 * len(rows[number])
        assert weights.shape == (2, 4, min(8, 21 - start), 21)
        assert weights.dtype == torch.float32
        assert not weights.requires_grad
        rows[number].append(weights)
    x, inputs, maps = model.enter(tokens)
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            inputs = inputs._replace(maps=maps.get(index))
            h, mixer_inputs = layer.mixer_inputs(x, inputs)
            weights = torch.cat(rows[index], dim=2)
            assert weights.triu(1).abs().max() == 0
            v = layer.mixer.v_proj(h).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, dim=1)
            expected = layer.mixer.o_proj((weights @ v).transpose(1, 2).flatten(2))
            torch.testing.assert_close(layer.mixer(h, mixer_inputs).x, expected, rtol=1e-4, atol=1e-4)
            outputs = layer(x, inputs)
            x, inputs = outputs.x, inputs.above(outputs)


def test_softmax_has_no_zeros_and_the_lazy_kernel_counts_its_own() -> None:
    tokens = some_tokens(2, 21)
    standard = awake(tiny("standard"))
    for _, _, weights in standard.attention_rows(tokens, query_block=32):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 21))
    assert sparsity_by_layer(standard, tokens) is None
    lower = torch.ones(21, 21).tril().bool()
    lazy = awake(tiny("lazy"))
    counted = [float((weights[..., lower] == 0).float().mean()) for _, _, weights in lazy.attention_rows(tokens, 32)]
    assert 0.1 < counted[0] < 0.9
    assert sparsity_by_layer(lazy, tokens) == pytest.approx(counted, abs=2e-3)
    hybrid = sparsity_by_layer(awake(tiny("lazy", pattern="first")), tokens)
    assert hybrid is not None and hybrid[0] is None and hybrid[1] > 0.1


def test_qk_norm_fixes_the_length_of_queries_and_keys_before_they_are_rotated() -> None:
    mixer = awake(tiny("standard", qk_norm=True, num_kv_heads=2)).layers[0].mixer
    with torch.no_grad():
        mixer.q_norm.weight.fill_(1.0)
        mixer.k_norm.weight.fill_(2.0)
        x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)) * 5
        q, k = mixer.queries_and_keys(x, BlockInputs(rope_tables(0, 9, 8, 10_000.0, x.device)))
        torch.testing.assert_close(q.norm(dim=-1), torch.full((1, 4, 9), 8**0.5))
        torch.testing.assert_close(k.norm(dim=-1), torch.full((1, 2, 9), 2 * 8**0.5))


def test_tau_and_bias_stay_float32_under_autocast() -> None:
    model = awake(tiny("lazy"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(some_tokens(1, 16))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    mixer = model.layers[0].mixer
    assert mixer.tau.grad.dtype == mixer.bias.grad.dtype == torch.float32
    assert mixer.tau.grad.abs().sum() > 0
    assert mixer.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("mixer", ATTENTION)
def test_weights_are_formed_in_float32_under_autocast(mixer: str) -> None:
    layer = awake(tiny(mixer)).layers[0].mixer
    q, k = torch.randn(2, 1, 4, 12, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected = layer.weights(q, k)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer.weights(q, k), expected)


def test_the_kernel_backend_changes_rounding_only() -> None:
    tokens = some_tokens(1, 20)
    with torch.no_grad():
        blockwise, reference = (
            Transformer(tiny("lazy"), VOCAB, kernel=kernel)(tokens) for kernel in ("blockwise", "reference")
        )
        torch.testing.assert_close(blockwise, reference, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="backend"):
            Transformer(tiny("lazy"), VOCAB, kernel="nonsense")(tokens)


def test_the_first_token_of_a_fresh_lazy_model_attends_to_nothing() -> None:
    model = Transformer(tiny("lazy"), VOCAB)
    _, _, weights = next(iter(model.attention_rows(some_tokens(3, 5), query_block=2)))
    assert torch.equal(weights[:, :, 0], torch.zeros(3, 4, 5))
    one = torch.randn(1, 1, 1, 8)
    out = lazy_attention(one, one, one, torch.zeros(1, 8), torch.full((1,), -1.0))
    assert torch.equal(out, torch.zeros_like(out))
