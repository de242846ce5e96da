"""Random attention problems, and the float64 oracle they are compared with."""

import itertools
import warnings
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from lazypipe.kernels import lazy_attention
from lazypipe.kernels.gpu.tiles import Tile

# Small tiles: several blocks, ragged ends and mask words even at lengths the interpreter gets through quickly.
SMALL_TILES = {
    "forward": Tile(32, 16, 4, 2),
    "query": Tile(16, 16, 4, 2),
    "key": Tile(16, 32, 4, 2),
    "bias": Tile(16, 16, 4, 2),
}
NAMES = ("out", "dq", "dk", "dv", "dbias", "dtau")
# log2(0) is meant (tau >= 0), and masked lanes may overflow before they are dropped; numpy warns where a GPU does not.
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")


class Problem(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor
    tau: torch.Tensor
    grad_out: torch.Tensor
    cu_seqlens: torch.Tensor | None
    position_offset: int

    @property
    def inputs(self):
        return self[:5]

    @property
    def options(self):
        return {"cu_seqlens": self.cu_seqlens, "position_offset": self.position_offset}

    def double(self):
        return self._replace(**{name: getattr(self, name).double() for name in self._fields[:6]})


def make_problem(
    seed, *, batch=1, heads_kv=1, group=1, query_len=40, key_len=None, dim=16, window=20, taus=(-0.9,), spread=1.0,
    documents=None, offset=0, dtype=torch.float32,
):  # fmt: skip
    """tau is moved off ties: no weight of the problem lies where another summation order could flip it."""
    key_len = query_len if key_len is None else key_len
    heads = heads_kv * group
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    cu_seqlens = None
    if documents is not None:
        cu_seqlens = torch.tensor([0, *documents, query_len], dtype=torch.int32)
    problem = Problem(
        q=draw(batch, heads, query_len, dim) * spread,
        k=draw(batch, heads_kv, key_len, dim),
        v=draw(batch, heads_kv, key_len, dim),
        bias=torch.randn(heads, window, generator=generator) * spread,
        tau=torch.zeros(heads),
        grad_out=draw(batch, heads, query_len, dim),
        cu_seqlens=cu_seqlens,
        position_offset=offset,
    )
    ratios = weight_ratios(problem)
    tau = [off_ties(ratios[:, h].flatten(), taus[h % len(taus)]) for h in range(heads)]
    return problem._replace(tau=torch.tensor(tau))


def visible_and_counts(problem):
    """(visible [Lq, Lk] bool, n_i [Lq]) written independently of the package."""
    query_len, key_len = problem.q.shape[2], problem.k.shape[2]
    visible = torch.zeros(query_len, key_len, dtype=torch.bool)
    counts = torch.zeros(query_len)
    ends = [0, query_len] if problem.cu_seqlens is None else problem.cu_seqlens.tolist()
    for start, end in itertools.pairwise(ends):
        for i in range(start, end):
            position = i + key_len - query_len
            visible[i, start : position + 1] = True
            counts[i] = position - start + 1 + problem.position_offset
    return visible, counts


def weight_ratios(problem):
    """p_ij n_i in float64 [B, H, Lq, Lk], nan where hidden or where n_i = 1 (that row is exact by definition)."""
    p = problem.double()
    zero_tau = torch.zeros_like(p.tau)
    group = p.q.shape[1] // p.k.shape[1]
    keys = p.k.repeat_interleave(group, 1)
    scores = p.q @ keys.transpose(-1, -2) * p.q.shape[3] ** -0.5
    visible, counts = visible_and_counts(p)
    query_at = torch.arange(p.q.shape[2])[:, None] + p.k.shape[2] - p.q.shape[2]
    distance = query_at - torch.arange(p.k.shape[2])
    inside = (distance >= 0) & (distance < p.bias.shape[1])
    scores = scores + torch.where(inside, p.bias[:, distance.clamp(0, p.bias.shape[1] - 1)], zero_tau[:, None, None])
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (probs * counts[:, None]).masked_fill(~visible | (counts == 1)[:, None], torch.nan)


def off_ties(ratios, wanted):
    """The middle of the widest gap of -p n within 5% of the wanted tau."""
    reach = max(0.05 * abs(wanted), 0.02)
    near = -ratios[~ratios.isnan()]
    near = near[(near - wanted).abs() < reach].sort().values
    edges = torch.cat([torch.tensor([wanted - reach]), near, torch.tensor([wanted + reach])])
    widest = int((edges[1:] - edges[:-1]).argmax())
    return float((edges[widest] + edges[widest + 1]) / 2)


def run(problem, backend):
    """[out, dq, dk, dv, dbias, dtau] of one backend."""
    inputs = [x.detach().clone().requires_grad_() for x in problem.inputs]
    out = lazy_attention(*inputs, **problem.options, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, problem.grad_out)]


def assert_matches_oracle(problem, backend, tolerance):
    """Output and every gradient against the float64 reference, relative to the largest entry."""
    expected = run(problem.double(), "reference")
    for name, x, y in zip(NAMES, run(problem, backend), expected, strict=True):
        assert torch.isfinite(x).all(), f"{name} of {backend} is not finite"
        error = (x.double() - y).abs().max().item()
        allowed = tolerance * max(1.0, y.abs().max().item())
        assert error <= allowed, f"{name} of {backend}: error {error:.2e}, allowed {allowed:.2e}"


@st.composite
def problems(draw, longest=48, dtypes=(torch.float32, torch.bfloat16)):
    """Everything the kernels promise to handle, mixed; lengths shrink towards 1."""
    query_len = draw(st.integers(1, longest))
    packed = draw(st.booleans()) and query_len > 1
    documents, key_len, offset, batch = None, query_len, 0, 1
    if packed:
        cuts = draw(st.lists(st.integers(1, query_len - 1), max_size=5))
        documents = sorted(cuts)  # equal cuts are empty documents, neighbours are documents of one token
    else:
        batch = draw(st.integers(1, 2))
        key_len = query_len + draw(st.sampled_from([0, 0, 1, 19]))
        offset = draw(st.sampled_from([0, 0, 7]))
    return make_problem(
        draw(st.integers(0, 2**31)),
        batch=batch,
        heads_kv=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        query_len=query_len,
        key_len=key_len,
        dim=draw(st.sampled_from([16, 24])),
        window=draw(st.sampled_from([1, 2, 17, 300])),
        taus=draw(st.lists(st.sampled_from([-1.0, -0.6, 0.0, 0.4, -1e4]), min_size=1, max_size=3)),
        spread=draw(st.sampled_from([1.0, 1.0, 0.0, 6.0])),
        documents=documents,
        offset=offset,
        dtype=draw(st.sampled_from(dtypes)),
    )
