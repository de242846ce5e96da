"""The package of the baselines, imported as triton was."""

import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def import_baselines_package() -> None:
    """Import flash-linear-attention, or skip the test without it.

    tests/kernels has imported triton for its interpreter, and what is built on triton must then be imported so too.
    """
    with pytest.MonkeyPatch.context() as environment:
        if isinstance(tl.cdiv, InterpretedFunction):
            environment.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("fla", reason="the extra `baselines` is not installed")
