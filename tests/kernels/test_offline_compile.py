"""What a GPU would be given: the kernels compiled for sm_80 and sm_90 on a machine without one."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def audit(tmp_path, *options):
    """The audit in a process of its own: here TRITON_INTERPRET replaces the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path / "audit.json"
    command = [sys.executable, "-m", "kernels.audit", "--json", str(path), "--workers", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text()), done.stdout


def check(findings):
    for f in findings:
        case = f["case"]
        name = f"{case['kernel']} {case['variant']} D={case['head_dim']} {case['dtype']} sm_{case['arch']}"
        rows = case["tile"][1] if case["kernel"] == "key" else case["tile"][0]
        if case["dtype"] == "bf16" and case["arch"] == 90 and rows >= 64 and not case["kernel"].startswith("decode"):
            assert f["wgmma"] > 0, f"{name} makes its products without wgmma"
        assert f["instructions"]["MUFU.EX2"] > 0, name
        assert f["plain_tf32"] == 0, f"{name} rounds float32 products to TF32"


def test_hopper_kernels_of_the_common_head_dim(tmp_path):
    findings, table = audit(tmp_path, "--arch", "90", "--dims", "64", "--dtypes", "bf16")
    check(findings)
    assert {f["case"]["kernel"] for f in findings} >= {"forward", "query", "key", "bias"}
    assert all(f["stack"] == 0 for f in findings), table
    assert "HGMMA" in table


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_default(tmp_path):
    findings, table = audit(tmp_path, "--dims", "16", "32", "64", "128", "256")
    check(findings)
    for f in findings:
        case = f["case"]
        if case["dtype"] == "bf16" or case["head_dim"] == 64:
            assert f["stack"] == 0, table


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_tile_compiles(tmp_path):
    findings, _ = audit(tmp_path, "--all", "--dims", "16", "32", "64", "128", "256")
    check(findings)
