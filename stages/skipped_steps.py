"""Which optimizer steps are left out, and when training gives up."""

import warnings

from stages.resume import RunState

MAX_NONFINITE_IN_A_ROW = 10


def count_nonfinite(state: RunState, finite: bool, loss: float, norm: float, lr: float) -> None:
    """Keep account of skipped steps; RuntimeError after too many in a row."""
    if finite:
        state.loss, state.nonfinite_in_a_row = loss, 0
        return
    state.nonfinite_steps += 1
    state.nonfinite_in_a_row += 1
    warnings.warn(f"step {state.step} skipped: loss {loss:g}, gradient norm {norm:g}", stacklevel=2)
    if state.nonfinite_in_a_row == MAX_NONFINITE_IN_A_ROW:
        raise RuntimeError(
            f"loss or gradient norm was not finite in {MAX_NONFINITE_IN_A_ROW} steps in a row, the last one step "
            f"{state.step} (loss {loss}, gradient norm {norm}, learning rate {lr:g}); lower lr or lengthen warmup_steps"
        )
