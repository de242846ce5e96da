"""What a GPU would be given: the kernels compiled for sm_80 and sm_90 on a machine without one."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

DIMS = ["16", "32", "64", "128", "256"]


def audit(tmp_path, *options):
    """The audit in a process of its own: here TRITON_INTERPRET replaces the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path / "audit.json"
    command = [sys.executable, "-m", "lazypipe.kernels.gpu.audit", "--json", str(path), "--workers", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr  # 1 when a kernel exceeds its architecture's shared memory
    return json.loads(path.read_text()), done.stdout


def check(findings):
    for f in findings:
        case = f["case"]
        name = f"{case['kernel']} {case['variant']} D={case['head_dim']} {case['dtype']} sm_{case['arch']}"
        rows = case["tile"][1] if case["kernel"] == "key" else case["tile"][0]
        if case["dtype"] != "fp32" and case["arch"] == 90 and rows >= 64:
            assert f["wgmma"] > 0, f"{name} makes its products without wgmma"
        assert f["instructions"]["MUFU.EX2"] > 0, name
        assert f["plain_tf32"] == 0, f"{name} rounds float32 products to TF32"


def test_hopper_kernels_of_the_common_head_dim(tmp_path):
    findings, table = audit(tmp_path, "--arch", "90", "--dims", "64", "--dtypes", "bf16")
    check(findings)
    assert {f["case"]["kernel"] for f in findings} == {"forward", "query", "key", "bias", "scores", "values"}
    assert all(f["stack"] == 0 for f in findings), table
    assert "HGMMA" in table


def test_float32_kernels_that_spilled_once(tmp_path):
    findings, table = audit(tmp_path, "--arch", "80", "--dims", "128", "--dtypes", "fp32", "--kernels", "query", "bias")
    check(findings)
    assert {f["case"]["kernel"] for f in findings} == {"query", "bias"}
    assert all(f["stack"] == 0 for f in findings), table


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_defaults_do_not_spill(tmp_path, dtype, dim):
    findings, table = audit(tmp_path, "--dims", dim, "--dtypes", dtype)
    check(findings)
    for f in findings:
        case = f["case"]
        spills = 128 if (case["kernel"], case["head_dim"], case["dtype"]) == ("forward", 256, "fp32") else 0
        assert f["stack"] <= spills, table


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_tile_compiles(tmp_path, arch, dtype, dim):
    findings, _ = audit(tmp_path, "--all", "--arch", arch, "--dims", dim, "--dtypes", dtype)
    check(findings)
