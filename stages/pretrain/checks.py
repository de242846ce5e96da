"""What pretraining looks at before its first step: settings without effect, and whether the kernels are right here."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from pathlib import Path

import torch

from lazypipe.kernels.gpu import preflight
from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.registry import MECHANISMS, mechanism
from lazypipe.stages.contract import UserError, Warn
from lazypipe.stages.pretrain.config import PretrainConfig


def warn_of_settings(config: PretrainConfig, world_size: int = 1, warn: Warn = warnings.warn) -> None:
    """Warn of settings that do not do what they say in this model, and of workers without work."""
    if world_size > config.micro_batches_per_step:
        warn(
            f"{world_size} workers share {config.micro_batches_per_step} micro-batches a step, so the rest of them is "
            "idle; lower workers or micro_batch_size, or raise tokens_per_step"
        )
    if config.warmup_steps >= config.steps:
        warn(
            f"warmup_steps={config.warmup_steps} is not below steps={config.steps}: the learning rate only rises, to "
            f"{config.steps / config.warmup_steps:.3g} of lr={config.lr:g}"
        )
    if config.parallel == "fsdp" and world_size == 1:
        warn("parallel=fsdp has nothing to share out with one worker; the model stays whole")
    for name, schedules in (("decay_fraction", ("wsd",)), ("min_lr_fraction", ("cosine", "linear", "wsd"))):
        value = getattr(config, name)
        if config.schedule not in schedules and value != type(config).model_fields[name].default:
            warn(f"{name}={value:g} has no effect with schedule={config.schedule}")
    for row in MECHANISMS.values():
        changed = config.model.changed(row.ablations)
        if changed and row is not config.model.mechanism:
            warn(
                f"{', '.join(changed)}: ablations of mixer={row.name}; they change nothing in "
                f"mixer={config.model.mixer}"
            )
    if config.spike_sigma is None and config.spike_window != type(config).model_fields["spike_window"].default:
        warn(f"spike_window={config.spike_window} has no effect without spike_sigma")
    if config.tau_bias_lr_multiplier != 1 and not config.tau_bias_apart:
        warn(
            f"tau_bias_lr_multiplier={config.tau_bias_lr_multiplier:g} is for tau and the distance bias of Lazy "
            "Attention, of which this model has none"
        )
    if config.activation_checkpointing != "none" and config.model.mechanism.whole_model:
        warn(
            f"activation_checkpointing={config.activation_checkpointing} is for blocks of our own; "
            f"mixer={config.model.mixer} trains without"
        )
    if config.compile and config.model.mechanism.whole_model:
        warn(f"compile=true is for blocks of our own; mixer={config.model.mixer} trains without")
    elif config.compile and (uncompiled := _uncompiled_mixers(config)):
        warn(
            f"compile=true has no effect on layers of {', '.join(uncompiled)} with document_masking and "
            f"activation_checkpointing={config.activation_checkpointing}; leave out one of the three"
        )
    if config.sink_balance and not config.model.mechanism.sink_logit:
        warn(
            f"sink_balance={config.sink_balance:g} balances learned sink logits; mixer={config.model.mixer} has none, "
            "and trains without"
        )


def _uncompiled_mixers(config: PretrainConfig) -> list[str]:
    """Mechanisms that take packed documents apart in Python, which torch cannot compile inside a checkpoint."""
    if not config.document_masking or config.activation_checkpointing == "none":
        return []
    return sorted({name for name in config.model.layer_mixers if not mechanism(name).compiles_packed(config.model)})


def check_compiler(device: torch.device) -> None:
    """UserError where torch.compile lacks what builds its code: C++ on a CPU, Triton's C on a GPU."""
    variable, usual = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    asked = os.environ.get(variable)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not any(shutil.which(name) for name in ([asked] if asked else usual)):
        missing = f"the compiler {variable}={asked}" if asked else f"a compiler, {' or '.join(usual)},"
    elif not header.exists():
        missing = f"{header} (Debian: python3-dev)"
    else:
        return
    raise UserError(
        f"compile=true builds extensions of Python, and {missing} is missing; install it, or set compile: false"
    )


def check_kernels(model: ModelConfig, kernel: str, dtype: str, device: torch.device) -> preflight.Preflight | None:
    """The kernel preflight: what will train, and how far it is from the float64 reference.

    None where no Triton kernel runs (no GPU, no lazy layer, another backend). UserError when the error is large.
    """
    if device.type != "cuda" or kernel_used(model, kernel) not in ("auto", "triton"):
        return None
    compute = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    try:
        return preflight.preflight(
            model.num_heads, model.kv_heads, model.head_dim, model.max_bias_length, compute, device=device
        )
    except preflight.PreflightError as error:
        raise UserError(str(error)) from error


def kernel_used(model: ModelConfig, kernel: str) -> str:
    """What the mixer computes with: the backend asked for, where it has a kernel, else sdpa, torch or a package."""
    return kernel if model.mechanism.has_kernel(model) else model.mechanism.computed_by
