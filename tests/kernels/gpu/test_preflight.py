"""Preflight: passes what is right, refuses what is not, and says why."""

import logging

import pytest
import torch

import lazypipe.kernels.gpu.decode
import lazypipe.kernels.gpu.preflight
import lazypipe.kernels.oracle
from lazypipe.kernels import lazy_attention
from lazypipe.kernels.gpu.preflight import PreflightError, preflight
from lazypipe.kernels.oracle import BOUNDS


def test_blockwise_passes(caplog, monkeypatch):
    # MLflow's migrations, run by an earlier test of the same process, switch existing loggers off.
    monkeypatch.setattr(lazypipe.kernels.gpu.preflight.log, "disabled", False)
    with caplog.at_level(logging.INFO):
        found = preflight(3, 1, 16, 40, torch.float32, device="cpu", backend="blockwise")
    assert max(found.errors.values()) <= found.bound
    assert "head_dim 16" in caplog.text


def test_triton_passes_and_names_its_tiles(monkeypatch):
    monkeypatch.setattr(lazypipe.kernels.gpu.preflight, "LENGTH", 140)  # the interpreter is slow
    found = preflight(1, 1, 16, 40, torch.bfloat16, device="cpu")
    assert max(found.errors.values()) <= BOUNDS[torch.bfloat16]
    assert "triton" in found.description
    assert "forward" in found.description


@pytest.mark.parametrize("spoil", [1.01, float("nan")])
def test_a_wrong_kernel_is_refused(monkeypatch, spoil):
    true = lazy_attention

    def wrong(*args, **options):
        out = true(*args, **options)
        return out * spoil if options["backend"] == "blockwise" else out

    monkeypatch.setattr(lazypipe.kernels.oracle, "lazy_attention", wrong)
    for inference in (False, True):
        with pytest.raises(PreflightError, match=r"out of backend 'blockwise' is off by .* do not compute with it"):
            preflight(2, 2, 16, 40, torch.float32, device="cpu", backend="blockwise", inference=inference)


def test_a_wrong_decode_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(lazypipe.kernels.gpu.preflight, "LENGTH", 140)
    found = preflight(2, 1, 16, 40, torch.float32, device="cpu", inference=True)
    assert set(found.errors) == {"out", "decode"} and max(found.errors.values()) <= 1e-5
    assert "decode" in found.description
    true = lazypipe.kernels.gpu.decode.launch_decode
    monkeypatch.setattr(
        lazypipe.kernels.gpu.decode, "launch_decode", lambda *args: (true(*args)[0] * 1.01, true(*args)[1])
    )
    with pytest.raises(PreflightError, match="decode of backend 'triton' is off by"):
        preflight(2, 1, 16, 40, torch.float32, device="cpu", inference=True)


def test_a_dtype_the_kernels_do_not_take():
    with pytest.raises(ValueError, match=r"dtype is torch.float64; expected"):
        preflight(1, 1, 16, 8, torch.float64, device="cpu")
