"""Every backend computes the same function: outputs and gradients against the float64 oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lazypipe.kernels import lazy_attention
from lazypipe.kernels.gpu.tiles import forced_tiles
from tests.kernels.problems import SMALL_TILES, assert_matches_oracle, make_problem, problems, run

# bfloat16 rounds weights and ds to 8 bits before their products; float32 errors grow with the logits (spread 6).
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
slow = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
wide = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("tau", [-0.9, 0.3, -1e4])
@pytest.mark.parametrize("documents", [None, [1, 2, 5]])
def test_gradcheck_float64(backend, tau, documents):
    p = make_problem(3, heads_kv=1, group=2, query_len=9, dim=4, window=4, taus=(tau,), documents=documents).double()
    inputs = [x.clone().requires_grad_() for x in p.inputs]
    assert torch.autograd.gradcheck(lambda *x: lazy_attention(*x, **p.options, backend=backend), inputs, atol=1e-7)


@given(problems(longest=300))
@quick
def test_blockwise_matches_oracle(problem):
    assert_matches_oracle(problem, "blockwise", TOLERANCE[problem.q.dtype])


@given(problems())
@slow
def test_triton_matches_oracle(problem):
    with forced_tiles(SMALL_TILES):
        assert_matches_oracle(problem, "triton", TOLERANCE[problem.q.dtype])


@pytest.mark.long
@given(problems(longest=700))
@wide
def test_blockwise_matches_oracle_wide(problem):
    assert_matches_oracle(problem, "blockwise", TOLERANCE[problem.q.dtype])


@pytest.mark.long
@pytest.mark.timeout(3600)
@given(problems(longest=130))
@wide
def test_triton_matches_oracle_wide(problem):
    with forced_tiles(SMALL_TILES):
        assert_matches_oracle(problem, "triton", TOLERANCE[problem.q.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_with_its_default_tiles(dtype):
    problem = make_problem(5, group=2, query_len=150, dim=32, window=70, taus=(-0.9, 0.2), dtype=dtype)
    assert_matches_oracle(problem, "triton", TOLERANCE[dtype])


@pytest.mark.parametrize("dim", [96, 256])
def test_triton_with_default_tiles_wider_than_high(dim):
    """16 x 32 in float32: their bias tiles once lay in memory transposed, and the output was off by its own size."""
    problem = make_problem(4, query_len=70, dim=dim, window=40, taus=(-0.9, 0.2))
    assert_matches_oracle(problem, "triton", TOLERANCE[torch.float32])


@pytest.mark.parametrize("dim", [96, 256])
def test_triton_pads_head_dim(dim):
    problem = make_problem(6, query_len=20, dim=dim, window=8)
    with forced_tiles(SMALL_TILES):
        assert_matches_oracle(problem, "triton", 1e-4)


def test_blockwise_is_right_beyond_one_strip():
    """Six key blocks: some rows have active and empty blocks, so several runs, and the band starts inside the strip."""
    problem = make_problem(7, batch=2, heads_kv=2, group=2, query_len=700, window=90, taus=(-1.0, -3.0, 0.2, -8.0))
    assert_matches_oracle(problem, "blockwise", 1e-4)


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
def test_all_equal_logits_at_the_tie(backend):
    """tau = -1 and uniform weights: every weight sits on the threshold, so outputs are compared, not gradients."""
    p = make_problem(8, query_len=33, spread=0.0, group=2)
    p = p._replace(tau=torch.tensor([-1.0, -1.0]))
    expected = lazy_attention(*p.double().inputs, backend="reference")
    with forced_tiles(SMALL_TILES):
        out = lazy_attention(*p.inputs, backend=backend)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
def test_first_token_of_a_document_is_cut_exactly_at_the_initial_tau(backend):
    p = make_problem(9, query_len=21, documents=[1, 8])._replace(tau=torch.tensor([-1.0]))
    with forced_tiles(SMALL_TILES):
        out = lazy_attention(*p.inputs, **p.options, backend=backend)
    assert not out[:, :, [0, 1, 8]].any()
    assert out[:, :, [2, 9]].any()


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
def test_documents_do_not_see_each_other(backend):
    """With tau > 0 hidden positions come out of the threshold positive; they must weigh nothing."""
    p = make_problem(10, query_len=40, documents=[13, 14], taus=(0.5,))
    with forced_tiles(SMALL_TILES):
        together = lazy_attention(*p.inputs, **p.options, backend=backend)
        for start, end in ((0, 13), (13, 14), (14, 40)):
            q, k, v = (x[:, :, start:end] for x in p.inputs[:3])
            alone = lazy_attention(q, k, v, p.bias, p.tau, backend=backend)
            torch.testing.assert_close(together[:, :, start:end], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
@pytest.mark.parametrize("tau", [-1.0, 0.5])
def test_cache_in_chunks_equals_one_pass(backend, tau):
    """Queries fed in chunks against a growing cache (prefill, then decode) give the rows of one full pass."""
    p = make_problem(11, heads_kv=1, group=2, query_len=50, taus=(tau,))
    with forced_tiles(SMALL_TILES), torch.no_grad():
        whole = lazy_attention(*p.inputs, backend=backend)
        for start, end in ((0, 20), (20, 41), (41, 42), (42, 50)):
            keys = (p.k[:, :, :end], p.v[:, :, :end])
            part = lazy_attention(p.q[:, :, start:end], *keys, p.bias, p.tau, backend=backend)
            torch.testing.assert_close(part, whole[:, :, start:end], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
def test_evicted_keys_count_in_the_threshold(backend):
    """Keys that weigh nothing may be evicted: with the offset the rest of the result stays as it was."""
    p = make_problem(12, query_len=1, key_len=30, taus=(-0.9,))
    k = p.k.clone()
    k[:, :, :10] = -p.q * 200 / p.q.norm()  # no weight at all on the first ten
    options = {"backend": backend}
    with torch.no_grad():
        full = lazy_attention(p.q, k, p.v, p.bias, p.tau, **options)
        kept = lazy_attention(p.q, k[:, :, 10:], p.v[:, :, 10:], p.bias, p.tau, position_offset=10, **options)
    torch.testing.assert_close(kept, full, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
def test_large_logits_stay_finite(backend):
    p = make_problem(13, query_len=30, spread=60.0, taus=(-0.9, 0.4), group=2)
    with forced_tiles(SMALL_TILES):
        for x in run(p, backend):
            assert torch.isfinite(x).all()
