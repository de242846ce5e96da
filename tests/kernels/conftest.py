"""Runs the Triton kernels in Triton's interpreter, in this folder only.

The interpreter is chosen when triton is imported and when a kernel is defined, so both happen here with
TRITON_INTERPRET=1; the variable is set again only while a test of this folder runs, so that nothing else inherits it.
"""

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("triton was imported before tests/kernels: collect tests/kernels first")

_before = os.environ.get("TRITON_INTERPRET")
os.environ["TRITON_INTERPRET"] = "1"
import lazypipe.kernels.gpu.decode  # noqa: E402
import lazypipe.kernels.gpu.launch  # noqa: E402, F401

if _before is None:
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("LAZYPIPE_TILE_CACHE", str(tmp_path / "tiles.json"))
