"""Statistics and the block mask: what they say, against the weights written out."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lazypipe.kernels import lazy_attention
from lazypipe.kernels.cpu.strips import BLOCK
from lazypipe.kernels.gpu.tiles import forced_tiles
from lazypipe.kernels.stats import block_any
from tests.kernels.problems import NAMES, SMALL_TILES, make_problem, problems, run, visible_and_counts, weight_ratios

some = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def weights_written_out(problem):
    visible, counts = visible_and_counts(problem)
    ratios = weight_ratios(problem)
    ratios = torch.where((counts == 1)[:, None] & visible, 1.0, ratios)  # one key: p = 1
    weights = torch.relu(ratios + problem.tau.double()[:, None, None]) / counts[:, None]
    return weights.nan_to_num(0.0), visible


def check_stats(problem, backend):
    weights, visible = weights_written_out(problem)
    with forced_tiles(SMALL_TILES):
        _, stats = lazy_attention(*problem.inputs, **problem.options, backend=backend, return_stats=True)
    torch.testing.assert_close(stats.surviving_mass.double(), weights.sum(-1), atol=1e-4, rtol=1e-4)
    sparsity = 1 - (weights > 0).sum(-1) / visible.sum(-1)
    torch.testing.assert_close(stats.row_sparsity.double(), sparsity.double(), atol=1e-6, rtol=0)
    used = block_any(weights > 0, stats.block_size)
    assert stats.block_mask.shape == used.shape
    assert not (used & ~stats.block_mask).any(), "an active pair lies in a block the mask calls empty"
    for x in stats[:3]:
        assert x.dtype == torch.float32
        assert not x.requires_grad
    return used, stats.block_mask


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@given(problem=problems(longest=300, dtypes=(torch.float32,)))
@some
def test_stats(backend, problem):
    check_stats(problem, backend)


@given(problem=problems(dtypes=(torch.float32, torch.bfloat16)))
@some
def test_stats_of_triton(problem):
    used, mask = check_stats(problem, "triton")
    assert torch.equal(used, mask), "off ties the mask of the second walk is exact"


@pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
def test_local_heads_leave_most_blocks_empty(backend):
    """A steep bias empties far blocks; a flat head keeps all: the mask must tell them apart, head by head."""
    p = make_problem(1, heads_kv=2, query_len=1000 if backend != "triton" else 256, window=16)
    p.bias[0] = 14.0
    p.bias[1] = 0.0
    p = p._replace(tau=torch.tensor([-1.0, -1.0]))
    with forced_tiles(SMALL_TILES), torch.no_grad():
        out, stats = lazy_attention(*p.inputs, backend=backend, return_stats=True)
        expected = lazy_attention(*p.double().inputs, backend="reference")
    rows, columns = stats.block_size
    row0, key0 = (torch.arange(n) * size for n, size in zip(stats.block_mask.shape[2:], (rows, columns), strict=True))
    causal = (key0 <= row0[:, None] + rows - 1).sum()
    assert stats.block_mask[0, 0].sum() < 0.5 * causal
    assert stats.block_mask[0, 1].sum() >= 0.9 * causal
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)


def test_lse_is_that_of_the_biased_scores():
    p = make_problem(2, query_len=35, taus=(-0.9,), group=2)
    expected = lazy_attention(*p.double().inputs, backend="reference", return_stats=True)[1].lse
    for backend in ("blockwise", "triton"):
        lse = lazy_attention(*p.inputs, backend=backend, return_stats=True)[1].lse
        torch.testing.assert_close(lse, expected, atol=1e-5, rtol=1e-5)


def test_stats_do_not_change_the_output():
    p = make_problem(4, query_len=500, taus=(-1.0, 0.3), group=2)
    for backend in ("reference", "blockwise"):
        plain = lazy_attention(*p.inputs, backend=backend)
        assert torch.equal(plain, lazy_attention(*p.inputs, backend=backend, return_stats=True)[0])


def test_values_of_empty_blocks_are_never_read():
    """Every query attends to the first keys alone, and all later values are NaN: reading one would poison a result.

    Keys of empty blocks are read, as ds = -p D reaches dq, dk and dbias there.
    """
    p = make_problem(5, heads_kv=4, query_len=900, window=30)
    toward = torch.zeros(16)
    toward[0] = 8.0
    k = p.k * 0.1
    k[:, :, 0] = toward
    p = p._replace(q=p.q * 0.1 + toward, k=k, tau=torch.full((4,), -1.0))
    p.bias.mul_(0.1)
    expected = run(p.double(), "reference")
    v = p.v.clone()
    v[:, :, BLOCK:] = torch.nan
    results = run(p._replace(v=v), "blockwise")
    for name, x, y in zip(NAMES, results, expected, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-3, rtol=1e-3, msg=f"{{}} in {name}".format)
    assert results[3][:, :, BLOCK:].abs().max() == 0, "dv of a value without weight"
