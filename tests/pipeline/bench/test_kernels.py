"""The benchmark command: its table, JSON and plot, and what it counts."""

import json

import pytest
import torch

from lazypipe.pipeline.bench.kernel_cases import outside_peer
from lazypipe.pipeline.bench.kernels import Case, block_density, case_inputs, causal_flops, main
from lazypipe.pipeline.bench.options import exit_code

SMALL = Case("train", 1, 4, 512, 16, 64, 0.5, "fp32", "cpu", 1)


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def half_values(q, k, v, bias, tau):
    """A peer for the test: not attention, but with a gradient for every input."""
    return q * 0.5 + 0 * (k.sum() + v.sum() + bias.sum() + tau.sum())


def test_small_run(tmp_path, capsys):
    sizes = ["--length", "64", "--heads", "2", "--head-dim", "16", "--window", "8", "--steep-share", "0.5"]
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    peer = ["--peer", "tests.pipeline.bench.test_kernels:half_values"]
    assert main([*sizes, *files, *peer, "--device", "cpu", "--repeats", "3", "--no-memory"]) == 0
    record = json.loads((tmp_path / "b.json").read_text())
    assert {r["mode"] for r in record["results"]} == {"forward", "train", "decode"}
    assert {r["peer"] for r in record["results"]} == {"blockwise", "reference", "sdpa", peer[1]}
    assert all(r["ms"] > 0 and r["tflops"] > 0 for r in record["results"] if r["mode"] != "decode")
    assert record["environment"]["torch"] == torch.__version__
    assert (tmp_path / "b.png").stat().st_size > 1000
    table = capsys.readouterr().out
    assert "| vs sdpa | 95 % " in table
    ratios = [r["vs_sdpa"] for r in record["results"] if "ms" in r]
    assert all(0 < ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in ratios)
    assert table.count("| blockwise ") == 3


def test_memory_is_taken_in_a_process_of_its_own(capsys):
    fields = json.dumps([SMALL._asdict(), "reference", []])
    assert main(["--one-peak", fields]) == 0
    assert float(capsys.readouterr().out) >= 0


def test_density_dial():
    flat, local = (block_density(SMALL._replace(length=1024, steep_share=share))["rho"] for share in (0.0, 1.0))
    assert flat == 1.0
    assert local < 0.5


def test_flops_are_those_of_causal_softmax():
    assert causal_flops(SMALL) == 7 * 2 * 4 * (512 * 513 / 2) * 16
    assert causal_flops(SMALL._replace(mode="decode")) == 2 * 2 * 4 * 512 * 16


def test_decode_has_one_query():
    x = case_inputs(SMALL._replace(mode="decode"), 0)
    assert x.q.shape[2] == 1
    assert x.k.shape[2] == 512
    assert not x.q.requires_grad


def test_a_peer_must_be_module_and_function():
    with pytest.raises(ValueError, match="expected module:function"):
        outside_peer("flash")


def test_no_gpu_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is visible")
    assert exit_code(main, ["--device", "cuda"]) == 2
    assert "no GPU is visible" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "64", "0"], "--length 0: must be at least 1"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--input-sets", "-1"], "--input-sets -1: must be at least 1"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--steep-share", "1.5"], "--steep-share 1.5: expected 0 to 1"),
        (["--matmul-tflops", "0"], "--matmul-tflops 0.0: expected a positive number"),
        (["--peer", "flash"], "--peer flash: peer is 'flash'; expected module:function"),
        (["--peer", "no_such_module:f"], "--peer no_such_module:f: No module named 'no_such_module'"),
        (["--peer", "math:no_such_function"], "no_such_function"),
        (["--json", "no/such/folder/b.json"], "--json no/such/folder/b.json: no/such/folder is no folder"),
        (["--plot", "."], "--plot .: cannot be written"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_timed(options, message, capsys, monkeypatch):
    monkeypatch.setattr(
        "lazypipe.pipeline.bench.kernels.matmul_tflops", lambda *_: pytest.fail("timed something first")
    )
    assert exit_code(main, ["--device", "cpu", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
