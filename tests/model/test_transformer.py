"""The transformer: parameter counts, initialisation, causality, decoding and the weights it says it uses."""

import pytest
import torch

from kernels import lazy_attention
from model.config import MIXERS, ModelConfig, parameter_count
from model.mixers import build_mixer
from model.rope import apply_rope, rope_tables
from model.transformer import Transformer, count_parameters

# hidden, intermediate, layers, heads, vocabulary, non-embedding, tied, untied, what lazy adds at W = 512
SIZES = {
    "70M": (512, 2048, 6, 8, 50304, 25_172_480, 50_928_128, 76_683_776, 24_624),
    "160M": (768, 3072, 12, 12, 50304, 113_265_408, 151_898_880, 190_532_352, 73_872),
    "340M": (1024, 2816, 24, 16, 32000, 308_331_520, 341_099_520, 373_867_520, 196_992),
    "500M": (896, 4864, 24, 14, 50304, 390_900_608, 435_972_992, 481_045_376, 172_368),
}
VOCAB = 61


def tiny(mixer: str, **fields: object) -> ModelConfig:
    """Two layers, four heads, W = 8: small enough for every test, with lengths beyond W."""
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 32, "max_bias_length": 8}
    return ModelConfig.model_validate({**shape, "mixer": mixer, **fields})


def awake(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose logits, biases and thresholds are far from flat, so that a mistake shows."""
    model = Transformer(config, VOCAB, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("tau"):
                parameter.uniform_(-1.0, 0.3, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def some_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_those_of_the_papers(size: str) -> None:
    hidden, intermediate, layers, heads, vocab, body, tied, untied, lazy_adds = SIZES[size]
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_layers": layers, "num_heads": heads}
    for tie, expected in ((True, tied), (False, untied)):
        for mixer, extra in (("standard", 0), ("lazy", lazy_adds)):
            config = ModelConfig.model_validate({**shape, "tie_embeddings": tie, "mixer": mixer})
            with torch.device("meta"):
                counted = count_parameters(Transformer(config, vocab))
            assert counted == (expected + extra, body + extra)
            assert parameter_count(config, vocab) == expected + extra


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_count_without_torch_holds_for_grouped_heads(mixer: str) -> None:
    config = tiny(mixer, num_kv_heads=2, tie_embeddings=False)
    assert parameter_count(config, VOCAB) == count_parameters(Transformer(config, VOCAB))[0]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_described_mixer_can_be_built(mixer: str) -> None:
    assert build_mixer(tiny(mixer)).o_proj.weight.shape == (32, 32)


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
        at = [tuple(table[p : p + 1] for table in tables) for p in (i, j)]
        return float((apply_rope(q, at[0]) * apply_rope(k, at[1])).sum())

    assert score(30, 13) == pytest.approx(score(17, 0), abs=1e-5)
    assert score(30, 13) != pytest.approx(score(30, 12), abs=1e-3)
    # The definition, pair (1, 9) of position 13: a plane rotation by 13 * theta^(-2/16).
    angle = 13 * 10_000 ** (-2 / 16)
    rotated = apply_rope(k, tuple(table[13:14] for table in tables)).flatten()
    plane = torch.tensor(complex(*k.flatten()[[1, 9]].tolist())) * torch.polar(torch.ones(()), torch.tensor(angle))
    torch.testing.assert_close(rotated[[1, 9]], torch.view_as_real(plane))


@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 2}, {"tie_embeddings": False}], ids=str)
@pytest.mark.parametrize("mixer", MIXERS)
def test_decoding_gives_the_logits_of_the_full_forward(mixer: str, fields: dict[str, object]) -> None:
    model = awake(tiny(mixer, **fields))
    tokens = some_tokens(2, 40)  # beyond W = 8 and beyond max_seq_len = 32
    with torch.no_grad():
        full = model(tokens)
        for pieces in ([1] * 40, [13, 1, 20, 6]):
            cache = model.new_cache(40)
            parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="room for 40 tokens and 41 were given"):
            model(tokens[:, :1], cache)


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_is_seen_before_its_turn(mixer: str) -> None:
    model = awake(tiny(mixer))
    tokens = some_tokens(1, 24)
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11], after[:, 11])
    assert not torch.allclose(before[:, 23], after[:, 23], atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_attention_rows_are_the_weights_the_layer_multiplies_with_v(mixer: str) -> None:
    model = awake(tiny(mixer, num_kv_heads=2))
    tokens = some_tokens(2, 21)
    rows: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for layer, start, weights in model.attention_rows(tokens, query_block=8):
        assert start == 8 * len(rows[layer])
        assert weights.shape == (2, 4, min(8, 21 - start), 21)
        assert weights.dtype == torch.float32
        assert not weights.requires_grad
        rows[layer].append(weights)
    x, rope = model._embed(tokens, 0)
    with torch.no_grad():
        for index, layer in enumerate(model.layers):
            h = layer.mixer_norm(x)
            weights = torch.cat(rows[index], dim=2)
            assert weights.triu(1).abs().max() == 0
            v = layer.mixer.v_proj(h).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, dim=1)
            expected = layer.mixer.o_proj((weights @ v).transpose(1, 2).flatten(2))
            torch.testing.assert_close(layer.mixer(h, rope), expected, rtol=1e-4, atol=1e-4)
            x = layer(x, rope)
    if mixer == "standard":
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 21))
        assert model.sparsity_by_layer(tokens) is None
    else:
        lower = torch.ones(21, 21).tril().bool()
        counted = [float((torch.cat(rows[n], dim=2)[..., lower] == 0).float().mean()) for n in (0, 1)]
        assert 0.1 < counted[0] < 0.9
        assert model.sparsity_by_layer(tokens) == pytest.approx(counted, abs=2e-3)


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


@pytest.mark.parametrize("mixer", MIXERS)
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
