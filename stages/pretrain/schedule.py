"""The learning rate of every step: a linear warm-up, then one of four shapes.

    cosine    half a cosine from lr to the floor (Loshchilov and Hutter 2017)
    linear    a straight line from lr to the floor
    wsd       warm-up, stable, decay: lr, and over the last decay_fraction of all steps a line to the floor
    constant  lr to the end; it knows no floor

The floor, min_lr_fraction * lr, is the rate of the last step. wsd is named and motivated in MiniCPM (arXiv 2404.06395),
whose decay halves every T steps; the line, and a fifth of all steps for it, are the cooldown of Haegele et al.
(arXiv 2405.18392). Before its decay a wsd run is that of any longer wsd run with the same warm-up.
"""

import math

from lazypipe.stages.pretrain.config import PretrainConfig


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
