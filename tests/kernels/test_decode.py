"""Decoding: a few queries against a cache, split over keys, reading V only where it is used."""

import pytest
import torch

from lazypipe.kernels import lazy_attention
from lazypipe.kernels.gpu.decode import launch_decode
from tests.kernels.problems import make_problem, weight_ratios


@pytest.mark.parametrize("tau", [-1.0, 0.3, -1e4])
@pytest.mark.parametrize(("query_len", "key_len", "offset"), [(1, 1, 0), (1, 150, 0), (3, 200, 9), (4, 4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_matches_oracle(tau, query_len, key_len, offset, dtype):
    p = make_problem(
        1, batch=2, heads_kv=2, group=2, query_len=query_len, key_len=key_len, dim=24, window=50, taus=(tau,),
        offset=offset, dtype=dtype,
    )  # fmt: skip
    expected = lazy_attention(*p.double().inputs, **p.options, backend="reference")
    out = lazy_attention(*p.inputs, **p.options, backend="triton")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_only_used_rows_of_values_are_read():
    """Rows of V without weight hold NaN: reading one would poison the output. The count is that of the used rows."""
    p = make_problem(2, heads_kv=2, group=2, query_len=1, key_len=190, taus=(-1.0, -2.0))
    used = (weight_ratios(p) + p.tau.double()[:, None, None] > 0).unflatten(1, (2, 2)).any(2)[:, :, 0]  # [B, Hkv, Lk]
    assert 0.2 < used.double().mean() < 0.8
    poisoned = p.v.masked_fill(~used[..., None], torch.nan)
    out, read = launch_decode(p.q, p.k, poisoned, p.bias, p.tau, 0, 0.25)
    expected = lazy_attention(*p.double().inputs, backend="reference")
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(read, used.sum(-1))


def test_decode_leaves_training_to_the_differentiable_path():
    p = make_problem(3, query_len=1, key_len=40)
    q = p.q.clone().requires_grad_()
    lazy_attention(q, *p.inputs[1:], backend="triton").sum().backward()
    assert q.grad.abs().sum() > 0
