"""AdamW: which parameters decay, and the learning rate of every step, a linear warm-up and then one of four shapes.

    cosine    half a cosine from lr to the floor (Loshchilov and Hutter 2017)
    linear    a straight line from lr to the floor
    wsd       warm-up, stable, decay: lr, and over the last decay_fraction of all steps a line to the floor
    constant  lr to the end; it knows no floor

The floor, min_lr_fraction * lr, is the rate of the last step. wsd is named and motivated in MiniCPM (arXiv 2404.06395),
whose decay halves every T steps; the line, and a fifth of all steps for it, are the cooldown of Haegele et al.
(arXiv 2405.18392). Before its decay a wsd run is that of any longer wsd run with the same warm-up.
"""

import math
from typing import Any

import torch
from torch import nn

from lazypipe.stages.pretrain.config import PretrainConfig


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over all parameters, of which those decay whose modules do not say otherwise.

    What a mixer names in `own_rate` (tau and distance bias) is a group of its own where its rate is another one.

    fused updates a tensor in one pass: 1.0 ms a step against 3.5 (foreach) and 3.2 (a loop), 1.07 M parameters, CPU.
    But it rounds the last few numbers of a piece of a tensor differently, so that shards would give other bits than the
    whole: reduction=ordered, which promises the same bits, takes foreach, also with one worker.
    """
    fused = config.reduction != "ordered"
    decayed, others = split_parameters(model)
    own_rate = _declared(model, "own_rate") if config.tau_bias_apart else set()
    apart = {name: p for name, p in others.items() if name in own_rate}
    rest = [p for name, p in others.items() if name not in apart]
    groups: list[dict[str, Any]] = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    if apart:
        multiplier = {"lr": config.lr * config.tau_bias_lr_multiplier, "lr_multiplier": config.tau_bias_lr_multiplier}
        groups.append({"params": list(apart.values()), "weight_decay": 0.0, **multiplier})
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=fused, foreach=not fused
    )


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(those that decay, those that do not) by name. A module names the latter in `undecayed`."""
    undecayed = _declared(model, "undecayed")
    decayed = {name: p for name, p in model.named_parameters() if name not in undecayed}
    others = {name: p for name, p in model.named_parameters() if name in undecayed}
    return decayed, others


def _declared(model: nn.Module, attribute: str) -> set[str]:
    """Full names of the parameters that modules name in `attribute`, relative to themselves."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, attribute, ())
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate of this step, times its own multiplier where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Rate of step 0 ... steps - 1. A run that ends within its warm-up ends on the ramp.

    Warm-up step s takes (s + 1) / warmup_steps of lr. cosine and linear leave lr with the second step after the
    warm-up; of the D steps of wsd's decay the first is 1 / D of the way down.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    floor = config.min_lr_fraction
    match config.schedule:
        case "cosine":
            return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        case "linear":
            return config.lr * (1 - (1 - floor) * min(1.0, progress))
        case "wsd":
            down = step + 1 - (config.steps - config.decay_steps)
            return config.lr * (1 - (1 - floor) * max(0, down) / config.decay_steps)
        case "constant":
            return config.lr
