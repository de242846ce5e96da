"""The promises of `lazy_attention` that are not mathematics: errors, strides, laziness, compilation, repeatability."""

import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lazypipe.kernels import lazy_attention
from lazypipe.kernels.cpu.blockwise import blockwise, blockwise_backward
from lazypipe.kernels.gpu.ops import triton_backward, triton_decode, triton_forward
from lazypipe.kernels.gpu.tiles import forced_tiles
from tests.kernels.problems import SMALL_TILES, make_problem, run

BACKENDS = ["reference", "blockwise", "triton"]


def arguments(**changes):
    p = make_problem(0, heads_kv=2, group=2, query_len=8, dim=16, window=4)
    given = dict(zip(("q", "k", "v", "bias", "tau"), p.inputs, strict=True))
    given.update(changes)
    return given


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(4, 8, 16)}, ValueError, "q has shape [4, 8, 16]; expected 4 dimensions"),
        ({"q": [1.0]}, TypeError, "q is a list; expected a torch.Tensor"),
        ({"q": torch.zeros(1, 3, 8, 16)}, ValueError, "q has 3 heads and k 2; expected a multiple"),
        ({"q": torch.zeros(1, 4, 9, 16)}, ValueError, "expected Lq <= Lk"),
        ({"q": torch.zeros(1, 4, 0, 16)}, ValueError, "expected no empty dimension"),
        ({"k": torch.zeros(2, 2, 8, 16), "v": torch.zeros(2, 2, 8, 16)}, ValueError, "expected [1, Hkv, Lk, 16]"),
        ({"k": torch.zeros(1, 2, 8, 8)}, ValueError, "k has shape [1, 2, 8, 8] and v [1, 2, 8, 16]"),
        ({"k": torch.zeros(1, 2, 8, 16).half()}, TypeError, "k has dtype torch.float16 and q torch.float32"),
        ({"k": torch.zeros(1, 2, 8, 16, device="meta")}, ValueError, "k is on meta and q on cpu"),
        ({"q": torch.zeros(1, 4, 8, 16).int()}, TypeError, "q has dtype torch.int32; expected float32"),
        ({"bias": torch.zeros(3, 4)}, ValueError, "bias has shape [3, 4]; expected [4, W]"),
        ({"bias": torch.zeros(4, 0)}, ValueError, "bias has shape [4, 0]"),
        ({"bias": torch.zeros(4, 4).bfloat16()}, TypeError, "bias has dtype torch.bfloat16; expected torch.float32"),
        ({"v": torch.zeros(1, 2, 8, 16).bfloat16()}, TypeError, "v has dtype torch.bfloat16 and q torch.float32"),
        ({"bias": torch.zeros(4, 4, device="meta")}, ValueError, "bias is on meta and q on cpu"),
        ({"tau": torch.zeros(4, device="meta")}, ValueError, "tau is on meta and q on cpu"),
        ({"tau": None}, TypeError, "tau is a NoneType; expected a torch.Tensor"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "cu_seqlens is on meta"),
        ({"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, "cu_seqlens is torch.int32 [1, 2]"),
        ({"tau": torch.zeros(2)}, ValueError, "tau has shape [2]; expected [4]"),
        ({"tau": torch.zeros(4).half()}, TypeError, "tau has dtype torch.float16; expected torch.float32"),
        ({"backend": "flash"}, ValueError, "backend is 'flash'; expected one of auto, reference, blockwise, triton"),
        ({"position_offset": -1}, ValueError, "position_offset is -1"),
        ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "cu_seqlens is torch.int64 [2]; expected int32"),
        (
            {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)},
            ValueError,
            "cu_seqlens is [0, 7]; expected a rising",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5, 3, 8], dtype=torch.int32)},
            ValueError,
            "expected a rising list from 0 to 8",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32), "position_offset": 2},
            ValueError,
            "position_offset is 2; expected 0 with cu_seqlens",
        ),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        lazy_attention(**arguments(**changes))


def test_packed_documents_want_one_batch_and_no_cache():
    cu = torch.tensor([0, 8], dtype=torch.int32)
    p = make_problem(0, batch=2, query_len=8)
    with pytest.raises(ValueError, match="q has batch size 2; expected 1 with cu_seqlens"):
        lazy_attention(*p.inputs, cu_seqlens=cu)
    p = make_problem(0, query_len=8, key_len=9)
    with pytest.raises(ValueError, match="k has 9 positions and q 8; expected as many"):
        lazy_attention(*p.inputs, cu_seqlens=cu)


def test_triton_says_what_it_cannot_take(monkeypatch):
    p = make_problem(0, query_len=8)
    with pytest.raises(ValueError, match=r"q is torch.float64 with head_dim 16; .* use backend='blockwise'"):
        lazy_attention(*p.double().inputs, backend="triton")
    with pytest.raises(ValueError, match="head_dim 8"):
        lazy_attention(*make_problem(0, query_len=8, dim=8).inputs, backend="triton")
    with pytest.raises(ValueError, match="head_dim 272"):
        lazy_attention(*make_problem(0, query_len=8, dim=272).inputs, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="q is on cpu; expected a CUDA device"):
        lazy_attention(*p.inputs, backend="triton")


def test_auto_on_a_cpu_is_blockwise():
    p = make_problem(1, query_len=50)
    assert torch.equal(lazy_attention(*p.inputs), lazy_attention(*p.inputs, backend="blockwise"))


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\nfrom kernels import lazy_attention\n"
        "x = torch.randn(1, 2, 5, 16)\n"
        "print(lazy_attention(x, x, x, torch.zeros(2, 3), -torch.ones(2)).shape)\n"
        "import lazypipe.kernels.gpu.preflight, lazypipe.kernels.gpu.audit, lazypipe.kernels.gpu.tuning\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1, 2, 5, 16]" in done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    """Views as models make them: heads inside the sequence axis, a slice of a fused projection, a sliced head_dim."""
    p = make_problem(2, batch=2, heads_kv=2, group=2, query_len=24, taus=(-0.9, 0.2))
    expected = run(p, backend)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in p[:3]]
    sliced = torch.cat([p.k, p.v], dim=-1)
    every_other = torch.stack([p.q, p.q], dim=-1).flatten(-2)[..., ::2]
    with forced_tiles(SMALL_TILES):
        for q, k, v in (swapped, (p.q, sliced[..., :16], sliced[..., 16:]), (every_other, p.k, p.v)):
            strided = [x.detach().requires_grad_() for x in (q, k, v, p.bias, p.tau)]
            out = lazy_attention(*strided, backend=backend)
            gradients = torch.autograd.grad(out, strided, p.grad_out.transpose(1, 2).contiguous().transpose(1, 2))
            for x, y in zip((out, *gradients), expected, strict=True):
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_with_room_to_grow(backend):
    """Decoding from the front of a larger buffer laid out [B, L, H, D], whose unused end holds NaN."""
    p = make_problem(2, batch=2, heads_kv=2, group=2, query_len=3, key_len=40, taus=(-0.9, 0.2))
    q = p.q.transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.full((2, 2, 64, 2, 16), torch.nan)
    cache[0, :, :40], cache[1, :, :40] = p.k.transpose(1, 2), p.v.transpose(1, 2)
    k, v = cache[:, :, :40].transpose(2, 3)
    assert not k.is_contiguous()
    assert torch.equal(k, p.k)
    with torch.no_grad():
        expected = lazy_attention(*p.double().inputs, backend="reference")
        out = lazy_attention(q, k, v, p.bias, p.tau, backend=backend)
        assert torch.equal(out, lazy_attention(q, k, v, p.bias, p.tau, backend=backend))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend):
    p = make_problem(3, query_len=20)
    inputs = [x.detach().requires_grad_() for x in p.inputs]
    with forced_tiles(SMALL_TILES):
        lazy_attention(*inputs, backend=backend).sum().backward()
        expected = run(p._replace(grad_out=torch.ones_like(p.grad_out)), backend)[1:]
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_alone(backend, wanted):
    p = make_problem(4, query_len=30, group=2, taus=(-0.9, 0.2))
    with forced_tiles(SMALL_TILES):
        expected = run(p, backend)[1 + wanted]
        inputs = [x.detach().clone().requires_grad_(i == wanted) for i, x in enumerate(p.inputs)]
        lazy_attention(*inputs, backend=backend).backward(p.grad_out)
    torch.testing.assert_close(inputs[wanted].grad, expected, atol=1e-6, rtol=1e-5)
    assert all(x.grad is None for i, x in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_are_bitwise_equal(backend, packed):
    length = 300 if backend != "triton" else 40
    shape = {"documents": [1, 17, length - 3]} if packed else {"batch": 2}
    p = make_problem(5, heads_kv=2, group=2, query_len=length, taus=(-1.0, 0.2), dtype=torch.bfloat16, **shape)
    with forced_tiles(SMALL_TILES):
        for x, y in zip(run(p, backend), run(p, backend), strict=True):
            assert torch.equal(x, y)


def test_no_kernel_uses_atomics():
    from pathlib import Path

    import lazypipe.kernels

    sources = sorted((Path(lazypipe.kernels.__file__).parent / "gpu").glob("*.py"))
    assert len(sources) >= 5
    assert not [path.name for path in sources if "tl.atomic" in path.read_text()]


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def op_inputs(p):
    return [x.detach().clone().requires_grad_() for x in p.inputs]


@pytest.mark.parametrize("documents", [None, [3, 9]])
@pytest.mark.parametrize("stats", [False, True])
def test_opcheck_blockwise(documents, stats):
    p = make_problem(7, query_len=20, group=2, taus=(-0.9, 0.2), documents=documents)
    torch.library.opcheck(blockwise, (*op_inputs(p), p.cu_seqlens, 0, 0.25, stats), test_utils=CHECKS)


@pytest.mark.parametrize("documents", [None, [3, 9]])
@pytest.mark.parametrize(("training", "stats"), [(True, False), (True, True), (False, True)])
def test_opcheck_triton(documents, training, stats):
    p = make_problem(8, query_len=20, group=2, taus=(-0.9, 0.2), documents=documents)
    inputs = op_inputs(p) if training else p.inputs  # without M the forward serves inference alone
    with forced_tiles(SMALL_TILES):
        torch.library.opcheck(triton_forward, (*inputs, p.cu_seqlens, 0, 0.25, training, stats), test_utils=CHECKS)


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["blockwise", "triton"])
def test_fake_kernels_have_the_strides_of_real_ones(op, dtype, heads_last):
    """Compiled code reads the memory that fakes promise. [B, L, H, D] in memory is what projections give."""
    p = make_problem(9, batch=2, heads_kv=2, group=2, query_len=20, dim=16, dtype=dtype)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) if heads_last else x for x in p.inputs[:3])
    inputs = (q, k, v, *p.inputs[3:])

    def both_passes(grad_out, *given):
        rest = (None, 0, 0.25)
        if op == "blockwise":
            forward = blockwise(*given, *rest, False)
            backward = blockwise_backward(grad_out, *given, None, forward[1], forward[4], *rest[1:], [True] * 5)
        else:
            forward = triton_forward(*given, *rest, True, False)
            saved = (forward[1], forward[2], forward[5])
            backward = triton_backward(grad_out, *given, None, *saved, *rest[1:], [True] * 5)
        return *forward, *backward

    with forced_tiles(SMALL_TILES):
        real = both_passes(p.grad_out, *inputs)
        with FakeTensorMode() as fake:
            promised = both_passes(*(fake.from_tensor(x) for x in (p.grad_out, *inputs)))
    for number, (one, two) in enumerate(zip(real, promised, strict=True)):
        assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype), number


@pytest.mark.parametrize("offset", [0, 5])
def test_opcheck_triton_decode(offset):
    p = make_problem(8, batch=2, heads_kv=2, group=2, query_len=3, key_len=40, taus=(-0.9, 0.2), offset=offset)
    torch.library.opcheck(triton_decode, (*p.inputs, offset, 0.25), test_utils=CHECKS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("documents", [None, [3, 9]])
def test_compiles_as_one_graph(backend, documents):
    p = make_problem(9, query_len=40, group=2, taus=(-0.9, 0.2), documents=documents)

    def doubled(*inputs):
        out, stats = lazy_attention(*inputs, cu_seqlens=p.cu_seqlens, backend=backend, return_stats=True)
        return 2 * out, stats.row_sparsity

    torch._dynamo.reset()
    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    results = []
    with forced_tiles(SMALL_TILES):
        for function in (doubled, compiled):
            inputs = op_inputs(p)
            out, sparsity = function(*inputs)
            results.append([out, sparsity, *torch.autograd.grad(out, inputs, p.grad_out)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_compiles_as_one_graph(backend):
    p = make_problem(10, heads_kv=2, group=2, query_len=1, key_len=40, taus=(-0.9, 0.2))

    def decode(q, k, v):
        with torch.no_grad():
            return lazy_attention(q, k, v, p.bias, p.tau, position_offset=3, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*p[:3]), decode(*p[:3]))
