"""Streamed attention metrics against an oracle that holds the whole matrix and loops over it in plain Python floats."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lazypipe.stages.sparsity.metrics import MEASURES, average_windows, measure_windows


def blocks_of(matrices: Tensor, query_block: int) -> Iterator[tuple[int, int, Tensor]]:
    """Cut [layers, B, H, L, L] into what a model yields."""
    for layer, weights in enumerate(matrices):
        for start in range(0, weights.shape[-2], query_block):
            yield layer, start, weights[:, :, start : start + query_block]


def oracle(matrix: list[list[float]]) -> dict[str, float]:
    """Every metric of one [L, L] matrix as metrics.md words it, one weight at a time."""
    length = len(matrix)
    pairs = [(i, j) for i in range(length) for j in range(i + 1)]
    masses = [math.fsum(row) for row in matrix]
    row_entropies = [
        -math.fsum(a / mass * math.log(a / mass) for a in row if a > 0)
        for row, mass in zip(matrix, masses, strict=True)
        if mass > 0
    ]
    return {
        "sparsity": sum(matrix[i][j] == 0 for i, j in pairs) / len(pairs),
        "near_zero": sum(matrix[i][j] < 1e-6 / (i + 1) for i, j in pairs) / len(pairs),
        "surviving_mass": math.fsum(masses) / length,
        "sink": math.fsum(row[0] for row in matrix) / length,
        "rest_mass": math.fsum(a for row in matrix for a in row[1:]) / length,
        "zero_mass_rows": sum(mass == 0 for mass in masses) / length,
        "entropy": -math.fsum(a * math.log(a) for row in matrix for a in row if a > 0),
        "row_entropy": math.fsum(row_entropies) / len(row_entropies) if row_entropies else math.nan,
        "concentration": math.sqrt(math.fsum(a * a for row in matrix for a in row)),
    }


def random_weights(shape: tuple[int, int, int, int], seed: int, zero_share: float) -> Tensor:
    """Elastic-Softmax-like weights [layers, B, H, L, L] float32: zeros, tiny weights, empty rows, rows of any mass."""
    layers, batch, heads, length = shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, batch, heads, length, length, generator=generator) * 6
    weights = torch.softmax(scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf), -1)
    weights = weights * (torch.rand(weights.shape, generator=generator) >= zero_share)
    return weights * (torch.rand(*weights.shape[:-1], 1, generator=generator) >= zero_share / 2)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 13)),
    query_block=st.integers(1, 16),
    seed=st.integers(0, 2**16),
    zero_share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
)
def test_streamed_metrics_equal_the_oracle(
    shape: tuple[int, int, int, int], query_block: int, seed: int, zero_share: float
) -> None:
    weights = random_weights(shape, seed, zero_share)
    measured = measure_windows(blocks_of(weights, query_block))
    assert set(measured) == set(MEASURES)
    for layer, window, head in np.ndindex(*shape[:3]):
        expected = oracle(weights[layer, window, head].double().tolist())
        for name, value in expected.items():
            np.testing.assert_allclose(measured[name][layer, window, head], value, rtol=1e-12, atol=1e-12, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 40), query_block=st.integers(1, 48), seed=st.integers(0, 2**16))
def test_result_does_not_depend_on_the_query_block(length: int, query_block: int, seed: int) -> None:
    weights = random_weights((2, 1, 2, length), seed, 0.5)
    whole = measure_windows(blocks_of(weights, length))
    blocked = measure_windows(blocks_of(weights, query_block))
    for name in MEASURES:
        np.testing.assert_allclose(blocked[name], whole[name], rtol=1e-12, atol=1e-13, err_msg=name)


def test_softmax_has_no_zeros_mass_one_and_a_known_entropy() -> None:
    uniform = torch.ones(1, 1, 1, 8, 8).tril() / torch.arange(1, 9)[:, None]
    measured = {name: value.item() for name, value in measure_windows(blocks_of(uniform, 3)).items()}
    assert measured["sparsity"] == 0 and measured["near_zero"] == 0 and measured["zero_mass_rows"] == 0
    assert measured["surviving_mass"] == pytest.approx(1, abs=1e-7)
    assert measured["sink"] == pytest.approx(sum(1 / n for n in range(1, 9)) / 8, abs=1e-7)
    assert measured["row_entropy"] == pytest.approx(sum(math.log(n) for n in range(1, 9)) / 8, abs=1e-6)
    assert measured["entropy"] == pytest.approx(8 * measured["row_entropy"], abs=1e-6)


def test_near_zero_threshold_follows_the_row() -> None:
    # Row i allows n_i = i + 1 tokens: 4e-7 is below 1e-6 / 2 in row 1, and above 1e-6 / 3 in row 2.
    weights = torch.tensor([[1.0, 0, 0], [4e-7, 1, 0], [4e-7, 1, 1]]).reshape(1, 1, 1, 3, 3)
    assert measure_windows(blocks_of(weights, 2))["near_zero"].item() == pytest.approx(1 / 6)


def test_window_of_one_token_and_window_without_any_mass() -> None:
    kept = measure_windows([(0, 0, torch.full((1, 1, 1, 1), 0.25))])
    assert kept["sparsity"].item() == 0 and kept["surviving_mass"].item() == 0.25 and kept["row_entropy"].item() == 0
    cut = measure_windows([(0, 0, torch.zeros(1, 1, 1, 1))])  # the first row of a lazy layer at tau = -1
    assert cut["sparsity"].item() == 1 and cut["zero_mass_rows"].item() == 1 and cut["entropy"].item() == 0
    assert math.isnan(cut["row_entropy"].item())


def test_average_leaves_out_undefined_windows_only_where_undefined() -> None:
    first = {"row_entropy": np.array([[[1.0, np.nan]]]), "sink": np.array([[[0.0, 0.5]]])}
    second = {"row_entropy": np.array([[[2.0, np.nan], [6.0, np.nan]]]), "sink": np.array([[[1.0, 0.5], [0.5, 0.5]]])}
    averaged = average_windows([first, second])
    np.testing.assert_array_equal(averaged["row_entropy"], [[3.0, np.nan]])
    np.testing.assert_array_equal(averaged["sink"], [[0.5, 0.5]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_weights_that_are_no_weights_are_refused(bad: float) -> None:
    weights = torch.ones(1, 1, 1, 4, 4).tril()
    weights[..., 2, 1] = bad
    with pytest.raises(ValueError, match=r"layer 0 .* \(queries 2 to 3\)"):
        measure_windows(blocks_of(weights, 2))


def test_missing_rows_and_layers_are_refused() -> None:
    weights = torch.ones(2, 1, 1, 4, 4).tril()
    with pytest.raises(ValueError, match="expected 4 query rows"):
        measure_windows(list(blocks_of(weights, 2))[:3])
    with pytest.raises(ValueError, match="each layer 0, 1"):
        measure_windows([(1, 0, weights[1])])
    with pytest.raises(ValueError):
        measure_windows([])
