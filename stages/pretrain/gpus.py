"""Peak arithmetic of GPUs, for the share of it that training uses (MFU). Imports no torch.

Dense figures in TFLOP/s at boost clock, from NVIDIA's data sheets, which print tensor-core figures with 2:4 sparsity:
those are halved here. `bfloat16` and `tf32` are of the tensor cores with float32 accumulation, `float32` of the CUDA
cores, which is what float32 matrices run on unless torch.set_float32_matmul_precision says otherwise.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Precision = Literal["bfloat16", "tf32", "float32"]


class Peak(NamedTuple):
    """Dense TFLOP/s by precision, and the data sheet that says so."""

    bfloat16: float
    tf32: float
    float32: float
    source: str


# By the name that torch.cuda.get_device_name gives, memory size and vendor left out. The first that matches counts.
# A name that is none of them (a MIG slice, a laptop's GPU of the same number) has no peak here.
PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"A100-SXM4", Peak(312, 156, 19.5, "A100 data sheet")),
    (r"A100-PCIE|A100 PCIe", Peak(312, 156, 19.5, "A100 data sheet")),
    (r"A30", Peak(165, 82, 10.3, "A30 data sheet")),
    (r"A40", Peak(149.7, 74.8, 37.4, "A40 data sheet")),
    (r"A10", Peak(125, 62.5, 31.2, "A10 data sheet")),
    (r"RTX A6000", Peak(154.8, 77.4, 38.7, "RTX A6000 data sheet")),
    (r"H100(?: HBM3)?", Peak(989.4, 494.7, 66.9, "H100 data sheet, SXM")),
    (r"H100 PCIe", Peak(756, 378, 51, "H100 data sheet, PCIe")),
    (r"H100 NVL", Peak(835.5, 417.5, 60, "H100 data sheet, NVL")),
    (r"GH200(?: HBM3e)?", Peak(989.4, 494.7, 66.9, "GH200 data sheet")),
    (r"H200(?: HBM3e)?", Peak(989.4, 494.7, 66.9, "H200 data sheet, SXM")),
    (r"H200 NVL", Peak(835.5, 417.5, 60, "H200 data sheet, NVL")),
    (r"B200", Peak(2250, 1125, 75, "HGX B200 data sheet")),
    (r"L4", Peak(121, 60, 30.3, "L4 data sheet")),
    (r"L40", Peak(181, 90.5, 90.5, "L40 data sheet")),
    (r"L40S", Peak(362, 183, 91.6, "L40S data sheet")),
    (r"RTX 6000 Ada Generation", Peak(364.2, 182.1, 91.1, "RTX 6000 Ada data sheet")),
    (r"GeForce RTX 3090", Peak(71, 35.6, 35.6, "NVIDIA Ampere GA102 white paper")),
    (r"GeForce RTX 4090", Peak(165.2, 82.6, 82.6, "NVIDIA Ada white paper")),
)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Dense peak in FLOP/s of a GPU as torch.cuda.get_device_name calls it; None for one that is not in the table."""
    name = re.sub(r"^NVIDIA ", "", device_name.strip())
    if "MIG" in name:
        return None
    name = re.sub(r"[ -]?\d+GB?(?= |$)", "", name).strip()
    for pattern, peak in PEAKS:
        if re.fullmatch(pattern, name):
            return 1e12 * float(getattr(peak, precision))
    return None
