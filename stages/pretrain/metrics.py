"""What training logs of a step, and what the machine has to do with it: speed, memory, the share of the GPU's peak."""

import contextlib
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lazypipe.model.config import BASELINES
from lazypipe.model.costs import training_flops_per_token
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.gpus import Precision, peak_flops

UNKNOWN = "unknown"


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


def machine(config: PretrainConfig, vocab_size: int, device: torch.device, workers: int) -> Machine:
    """The machine under a run, and its memory counter set back to now."""
    flops = training_flops_per_token(config.model, vocab_size, config.seq_len, config.micro_batch_size)
    if device.type != "cuda":
        with contextlib.suppress(OSError):  # "5" sets VmHWM back: a reused worker process had other stages before
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return Machine(None, workers, flops, None)
    torch.cuda.reset_peak_memory_stats(device)
    name = torch.cuda.get_device_name(device)
    # A baseline's own operations are not counted: model/costs.py knows the standard model it is matched to.
    peak = None if config.model.mixer in BASELINES else peak_flops(name, matrix_precision(config))
    return Machine(name, workers, flops, peak)


def matrix_precision(config: PretrainConfig) -> Precision:
    """What CUDA multiplies matrices in: float32 ones only on tensor cores (as TF32) when torch was told so."""
    if config.dtype == "bfloat16":
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


def step_numbers(
    config: PretrainConfig,
    loss: float,
    balance: float,
    log_z_squared: float,
    lr: float,
    grad_norm: float,
    seconds: float,
    validation_loss: float | None,
) -> dict[str, float | None]:
    """The columns of tables/history, by name; null where not measured. Losses in nats, seconds of the step.

    balance, log_z_squared: the head balance of `sink` and the z-loss, before their weights.
    """
    numbers: dict[str, float | None] = {
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_s": config.tokens_per_step / seconds,
        "validation_loss": validation_loss,
    }
    if config.tau_bias_apart:
        numbers["lr_tau_bias"] = config.tau_bias_lr_multiplier * lr
    if config.sink_balance and config.model.mixer == "sink":
        numbers["sink_balance_loss"] = config.sink_balance * balance
    if config.z_loss:
        numbers["z_loss"] = config.z_loss * log_z_squared
    return numbers


def speed_numbers(
    config: PretrainConfig, under: Machine, seconds: float, waited: float, device: torch.device
) -> dict[str, float | None]:
    """Columns of tables/history beside `step_numbers`, of one step of `seconds` of which `waited` went into batches.

    step_seconds; data_wait, the share of the step spent making batches; peak_memory_gb; mfu where the peak is known.
    """
    numbers: dict[str, float | None] = {
        "step_seconds": seconds,
        "data_wait": waited / seconds,
        "peak_memory_gb": peak_memory_gb(device),
    }
    mfu = under.utilisation(config.tokens_per_step / seconds)
    return numbers if mfu is None else numbers | {"mfu": mfu}


def run_numbers(under: Machine, tokens: int, seconds: float, waited: float, device: torch.device) -> dict[str, float]:
    """The same over a whole run of `tokens` tokens, validation and checkpoints left out: final metrics."""
    numbers = {"data_wait": waited / seconds, "peak_memory_gb": peak_memory_gb(device)}
    mfu = under.utilisation(tokens / seconds)
    return numbers if mfu is None else numbers | {"mfu": mfu}
