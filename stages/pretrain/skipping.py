"""Which optimizer steps are left out, and when training gives up.

All is decided from the loss and the gradient norm of the whole step, which every worker has alike. A step that is left
out costs its batch: weights and moments stay, the data and the learning rate go on.
"""

import math

from lazypipe.stages.pretrain.checkpoint.state import RunState


def reason_to_skip(
    state: RunState, loss: float, norm: float, spike_sigma: float | None, spike_window: int
) -> str | None:
    """Why this step must not be taken: something is not finite, or a spike beyond spike_sigma. None: take it.

    A spike: loss or norm above mean + spike_sigma standard deviations of those of the last spike_window steps that were
    finite, spikes included, so that a level that stays is accepted in the end (OLMo-core's rule). Never one of the
    first spike_window steps.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"loss {loss:g}, gradient norm {norm:g}"
    if spike_sigma is None or len(state.recent_losses) < spike_window:
        return None
    for name, value, recent in (("loss", loss, state.recent_losses), ("gradient norm", norm, state.recent_norms)):
        mean = math.fsum(recent) / len(recent)  # exactly rounded: no order, no machine changes the decision
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in recent) / len(recent))
        if value > mean + spike_sigma * deviation:
            return (
                f"{name} {value:g} is a spike, above {mean:g} + spike_sigma={spike_sigma:g} x {deviation:g} of "
                f"the last {len(recent)} finite steps"
            )
    return None


def record(state: RunState, reason: str | None, loss: float, norm: float, keep: int) -> None:
    """Count a step, taken or left out for `reason`; keep the last `keep` finite losses and gradient norms."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        state.nonfinite_steps += 1
        state.nonfinite_in_a_row += 1
        return
    state.loss, state.nonfinite_in_a_row = loss, 0
    state.spikes_skipped += reason is not None
    if keep:
        state.recent_losses = [*state.recent_losses, loss][-keep:]
        state.recent_norms = [*state.recent_norms, norm][-keep:]


def divergence(state: RunState, loss: float, norm: float, lr: float, saved_in: object) -> str:
    """The message of giving up. saved_in: the folder of the resume checkpoints.

    A run that goes on from such a state gives up at the next step that is not finite.
    """
    return (
        f"loss or gradient norm was not finite in {state.nonfinite_in_a_row} steps in a row, the last one step "
        f"{state.step} (loss {loss}, gradient norm {norm}, learning rate {lr:g}); lower lr or lengthen warmup_steps, "
        f"which is another run and starts from its beginning. The weights from before them are saved in {saved_in}: "
        "the same config goes on from there, with a higher max_nonfinite_in_a_row for longer"
    )
