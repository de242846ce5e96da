"""Every tile that ships computes what the float64 reference does, whatever its blocks: `tile_errors`."""

import itertools

import pytest
import torch

import lazypipe.kernels.gpu.launch
from lazypipe.kernels import lazy_attention
from lazypipe.kernels.gpu.launch import Saved, launch_bias, launch_forward, launch_key, launch_query
from lazypipe.kernels.gpu.tile_errors import NARROW_WINDOW, cases_for, errors_of, main, problem_length, problems_for
from lazypipe.kernels.gpu.tiles import KERNELS, default_tile, fits, forced_tiles, padded_dim, shipped_tiles
from lazypipe.kernels.gpu.toeplitz import bias_tiles
from lazypipe.kernels.oracle import BOUNDS

CPU = torch.device("cpu")
CLASSES = (16, 32, 64, 128, 256)
BETWEEN = (24, 48, 96, 192)  # padded to a class
DTYPES = (torch.float32, torch.bfloat16)


def named(case):
    dtype = str(case.dtype).removeprefix("torch.")
    blocks = "-".join(f"{tile.block_m}x{tile.block_n}" for tile in case.tiles.values())
    return f"{case.head_dim}-{dtype}-{case.source}-{blocks}"


def default_runs():
    """(case, which of its problems): with two default sets in a class, one problem each, since one takes a second."""
    for dim, dtype in itertools.product(CLASSES, DTYPES):
        cases = cases_for(dim, dtype, every_tile=False)
        for index, case in enumerate(cases):
            yield pytest.param(case, (0, 1) if len(cases) == 1 else (index,), id=named(case))


def all_runs():
    for dim, dtype in itertools.product((*CLASSES, *BETWEEN), (*DTYPES, torch.float16)):
        for case in cases_for(dim, dtype):
            yield pytest.param(case, (0, 1), id=named(case))


def assert_within_bound(case, which):
    problems = problems_for(case, CPU)
    errors = errors_of(case, [problems[index] for index in which])
    assert max(errors.values()) <= BOUNDS[case.dtype], errors


@pytest.mark.parametrize(("case", "which"), list(default_runs()))
def test_default_tiles_match_the_reference(case, which):
    assert_within_bound(case, which)


@pytest.mark.long
@pytest.mark.parametrize(("case", "which"), list(all_runs()))
def test_every_tile_matches_the_reference(case, which):
    assert_within_bound(case, which)


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("dim", [*CLASSES, *BETWEEN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cases_hold_every_tile_that_ships(dim, dtype, by_blocks):
    """And the problems are what they are said to be: two blocks, an incomplete one, one beyond the narrow bias."""
    wide, padded = dtype == torch.float32, padded_dim(dim)
    cases = cases_for(dim, dtype, by_blocks=by_blocks)
    length = slice(2 if by_blocks else 4)
    for kernel, arch in itertools.product(KERNELS, (8, 9)):
        there = {case.tiles[kernel][length] for case in cases}
        assert {tile[length] for tile in shipped_tiles(kernel, padded, wide, arch)} <= there
        defaults = {name: default_tile(name, padded, wide, arch)[length] for name in KERNELS}
        assert any({name: tile[length] for name, tile in case.tiles.items()} == defaults for case in cases)
    for case in cases:
        queries = problem_length(case)
        for kernel, tile in case.tiles.items():
            assert fits(kernel, tile, case.tiles["forward"]) or kernel == "forward"
            for block in tile[:2]:
                assert queries > block and queries % block
            last_row = (queries - 1) // tile.block_m * tile.block_m
            assert last_row >= NARROW_WINDOW + tile.block_n - 1


def test_a_transposed_bias_is_found(monkeypatch):
    """What the kernels read before: tiles whose two dimensions lie in memory the other way round."""
    true = bias_tiles
    monkeypatch.setattr(
        lazypipe.kernels.gpu.launch, "bias_tiles", lambda *args, **options: as_if_transposed(true(*args, **options))
    )
    case = cases_for(16, torch.float32, every_tile=False)[0]
    errors = errors_of(case, problems_for(case, CPU)[:1])
    assert min(errors[name] for name in ("out", "dq", "dk", "dv", "dbias", "dtau")) > 0.01


def test_what_a_kernel_cannot_index_is_refused(monkeypatch):
    """Each tensor that a kernel counts through by its shape, laid out some other way."""
    case = cases_for(96, torch.float32, every_tile=False)[0]
    problem = problems_for(case, CPU)[1]
    inputs = [x.detach().clone().requires_grad_() for x in problem[:5]]
    q, k, v, bias, tau = (x.detach() for x in inputs)
    laid_out = launch_forward(q, k, v, bias, tau, problem.cu_seqlens, 0, 0.1, True, False)
    saved = Saved(q, q, k, v, bias, tau, problem.cu_seqlens, laid_out.lse, laid_out.mean, laid_out.words, 0, 0.1)
    for name in ("bias", "tau", "lse", "mean", "words", "q", "k", "v", "grad_out"):
        with pytest.raises(RuntimeError, match=rf"{name} has .*strides .*the kernel"):
            launch_query(saved._replace(**{name: every_other(getattr(saved, name))}), True)
    for launch in (lambda s, d: launch_key(s, d, True, True), launch_bias):
        with pytest.raises(RuntimeError, match=r"delta has shape .* and strides"):
            launch(saved, every_other(laid_out.lse))
    forward = case.tiles["forward"]._replace(block_m=32)
    with forced_tiles({"forward": forward}), pytest.raises(RuntimeError, match=r"mask words has shape"):
        launch_query(saved, True)
    true = bias_tiles
    monkeypatch.setattr(
        lazypipe.kernels.gpu.launch, "bias_tiles", lambda *args, **options: every_other(true(*args, **options))
    )
    with pytest.raises(RuntimeError, match=r"bias tiles has shape .* and strides"):
        lazy_attention(*inputs, backend="triton")


def every_other(x):
    """The same values, with gaps between them in memory."""
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
def test_expanded_inputs_and_gradients(backend):
    """Stride 0, as a shared tau, a bias broadcast over heads, or the gradient of a sum come: read as what they mean."""
    case = cases_for(16, torch.float32, every_tile=False)[0]
    problem = problems_for(case, CPU)[1]
    tau = problem.tau[:1].clone().requires_grad_()
    row = problem.bias[:1].clone().requires_grad_()
    q = problem.q.clone().requires_grad_()
    found = []
    for one, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        out = lazy_attention(
            q.to(dtype), problem.k.to(dtype), problem.v.to(dtype),
            row.to(dtype).expand(2, -1), tau.to(dtype).expand(2), cu_seqlens=problem.cu_seqlens, backend=one,
        )  # fmt: skip
        found.append([out, *torch.autograd.grad(out.sum(), (q, row, tau))])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), atol=2e-4, rtol=2e-4)


def as_if_transposed(tiles):
    return tiles.transpose(2, 3).contiguous().view(tiles.shape)


@pytest.mark.parametrize(("seeded", "code"), [(False, 0), (True, 1)])
def test_the_command_prints_the_table_and_says_whether_it_holds(monkeypatch, capsys, seeded, code):
    if seeded:
        true = bias_tiles
        monkeypatch.setattr(
            lazypipe.kernels.gpu.launch, "bias_tiles", lambda *args, **options: as_if_transposed(true(*args, **options))
        )
    assert main(["--dims", "16", "--dtypes", "fp32", "--arch", "80", "--defaults"]) == code
    head, row, worst = capsys.readouterr().out.splitlines()
    assert len(head.split()) == len(row.split())
    assert row.split()[:4] == ["16", "fp32", "sm_80", "32x32x4x2"] and worst.startswith("worst")
