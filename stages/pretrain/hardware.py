"""What the speed of a run is measured against: the peak arithmetic of GPUs, model FLOPs, peak memory.

Dense figures in TFLOP/s at boost clock, from NVIDIA's data sheets, which print tensor-core figures with 2:4 sparsity:
those are halved here. `bfloat16` and `tf32` are of the tensor cores with float32 accumulation, `float32` of the CUDA
cores, which is what float32 matrices run on unless torch.set_float32_matmul_precision says otherwise.
"""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from lazypipe.model.config import ModelConfig
from lazypipe.model.costs import training_flops_per_token

UNKNOWN = "unknown"

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


@dataclass(frozen=True)
class Machine:
    """What the speed of a run is measured against, the same for all of its steps.

    gpu              name of the GPU; None on a CPU
    workers          data-parallel workers, a GPU each
    flops_per_token  of the model, forward and backward (model/costs.py)
    peak_flops       dense FLOP/s of one GPU at the precision of the matrix products; None when it is not known
    """

    gpu: str | None
    workers: int
    flops_per_token: float
    peak_flops: float | None

    def utilisation(self, tokens_per_s: float) -> float | None:
        """Model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B): useful operations / peak of all GPUs."""
        if self.peak_flops is None:
            return None
        return self.flops_per_token * tokens_per_s / (self.peak_flops * self.workers)


def machine_of(
    model: ModelConfig,
    vocab_size: int,
    *,
    seq_len: int,
    micro_batch_size: int,
    dtype: str,
    device: torch.device,
    workers: int,
) -> Machine:
    """What a run on `workers` devices like `device` is measured against; sets the counter of peak memory back to now.

    dtype: float32 or bfloat16, that of the matrix products.
    """
    flops = training_flops_per_token(model, vocab_size, seq_len, micro_batch_size)
    if device.type != "cuda":
        with contextlib.suppress(OSError):  # "5" sets VmHWM back: a reused worker process had other stages before
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return Machine(None, workers, flops, None)
    torch.cuda.reset_peak_memory_stats(device)
    name = torch.cuda.get_device_name(device)
    # A baseline's own operations are not counted: model/costs.py knows the standard model it is matched to.
    peak = None if model.mechanism.whole_model else peak_flops(name, matrix_precision(dtype))
    return Machine(name, workers, flops, peak)


def matrix_precision(dtype: str) -> Precision:
    """What CUDA multiplies matrices of `dtype` in: float32 on tensor cores (as TF32) only where torch is told so."""
    if dtype == "bfloat16":
        return "bfloat16"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def peak_memory_gb(device: torch.device) -> float:
    """The most memory of this worker so far, in 10^9 bytes: of torch's tensors on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9  # a counter on the host: nothing is waited for
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0]) / 1e9
    except (OSError, IndexError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
