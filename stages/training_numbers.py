"""What training logs of a step."""

from stages.pretrain_config import PretrainConfig


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
