"""Steps that are left out: non-finite ones until training gives up with its state saved, and spikes."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load

from lazypipe.stages.contract import Artifact, Context, DivergedError, Interrupted, Outputs, UserError
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.checkpoint.state import RunState
from lazypipe.stages.pretrain.checks import warn_of_settings
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.skipping import reason_to_skip, record
from lazypipe.stages.pretrain.trainer import Trainer
from tests.stages.pretrain.toy_training import context_in, start_process, tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

SPIKES = {"spike_sigma": 0.5, "spike_window": 3, "lr": 0.2, "warmup_steps": 1}  # so rough that steps are skipped


def verdicts(config: PretrainConfig, losses: list[float], norms: list[float]) -> tuple[list[bool], RunState]:
    """Which steps are taken, and the state after them, of a run with these losses and norms."""
    state, taken = RunState(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for loss, norm in zip(losses, norms, strict=True):
            reason = reason_to_skip(state, loss, norm, config.spike_sigma, config.spike_window)
            state.step += 1
            record(state, reason, loss, norm, 0 if config.spike_sigma is None else config.spike_window)
            taken.append(reason is None)
    return taken, state


def test_a_spike_is_beyond_k_sigma_of_the_last_finite_steps() -> None:
    """Against NumPy's mean and deviation of a window kept apart."""
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(4.0, 0.1, 200).tolist(), rng.normal(1.0, 0.1, 200).tolist()
    for step, value in ((2, 50.0), (40, 50.0), (41, math.nan), (90, math.inf), (150, 4.45)):
        losses[step] = value
    norms[120], norms[121] = 9.0, math.nan
    config = PretrainConfig(spike_sigma=2.0, spike_window=16)
    taken, state = verdicts(config, losses, norms)
    expected: list[Any] = []
    window: list[Any] = []
    for loss, norm in zip(losses, norms, strict=True):
        finite = math.isfinite(loss) and math.isfinite(norm)
        full = len(window) == 16
        over = full and bool((np.array([loss, norm]) > np.mean(window, 0) + 2 * np.std(window, 0)).any())
        expected.append(finite and not over)
        if finite:
            window = [*window, (loss, norm)][-16:]
    assert taken == expected
    assert not any(taken[step] for step in (40, 41, 90, 120, 121, 150)) and taken[2]
    assert state.nonfinite_steps == 3
    assert state.spikes_skipped == taken.count(False) - 3
    assert (len(state.recent_losses), len(state.recent_norms), state.nonfinite_in_a_row) == (16, 16, 0)


def test_a_new_level_is_accepted_after_a_while() -> None:
    taken, _ = verdicts(PretrainConfig(spike_sigma=3.0, spike_window=8), [4.0, 4.1] * 8 + [6.0, 6.1] * 8, [1.0] * 32)
    assert all(taken[:16]) and not taken[16] and all(taken[20:])


def test_without_the_guard_nothing_is_kept() -> None:
    taken, state = verdicts(PretrainConfig(), [4.0] * 200 + [1e9], [1.0] * 201)
    assert all(taken) and (state.recent_losses, state.recent_norms, state.spikes_skipped) == ([], [], 0)
    with pytest.warns(UserWarning, match="spike_window=9 has no effect without spike_sigma"):
        warn_of_settings(PretrainConfig(spike_window=9))


class StoppingContext(Context):
    """Asks for a stop once step `stop_at` has been logged."""

    stop_at = 0

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log_metrics(step, metrics)
        if step == self.stop_at:
            (self.scratch_dir / "stop").touch()


def trained_weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "output" / "checkpoint" / "model.safetensors")


@pytest.mark.filterwarnings("ignore:step .*skipped. .* is a spike")
def test_spikes_are_skipped_alike_after_a_resume_and_on_two_workers(corpus: Artifact, tmp_path: Path) -> None:
    """Bitwise after the resume, whose window was filled before it; to rounding with a second worker."""
    config = tiny_run("standard", **SPIKES)
    alone = pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path / "alone"))
    assert 1 <= alone.facts.spikes_skipped <= 6

    plain = context_in(tmp_path / "resumed")
    context = StoppingContext(plain.output_dir, plain.scratch_dir)
    context.stop_at = 6
    with pytest.raises(Interrupted):
        pretrain.run(config, {"tokenize": corpus}, context)
    (context.scratch_dir / "stop").unlink()
    resumed = pretrain.run(config, {"tokenize": corpus}, context)
    assert resumed.facts.resumed_from == 7  # told after step 6, all workers learn of it with the next
    assert resumed.facts.spikes_skipped == alone.facts.spikes_skipped
    expected = trained_weights(tmp_path / "alone")
    for name, tensor in trained_weights(tmp_path / "resumed").items():
        assert torch.equal(tensor, expected[name]), name

    together, rendezvous = tmp_path / "together", tmp_path / "rendezvous"
    context_in(together)
    workers = [start_process(corpus.path.parent, together, config, 0, rank, 2, rendezvous) for rank in (0, 1)]
    for worker in workers:
        worker.join(120)
    for rank in (0, 1):
        result = json.loads((together / f"result-{rank}.json").read_text())
        assert result["facts"]["spikes_skipped"] == alone.facts.spikes_skipped
    for name, tensor in trained_weights(together).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:step .*skipped. loss")
def test_giving_up_saves_the_last_good_weights_and_says_what_next(corpus: Artifact, tmp_path: Path) -> None:
    """Steps 4 to 8 are poisoned. A limit of 3 ends at step 6; then at once at 7; a limit of 6 comes through."""
    weights_seen: dict[int, torch.Tensor] = {}

    class Poisoned(Trainer):
        def accumulate_gradients(self) -> torch.Tensor:
            weights_seen[self.state.step] = self.model.embedding.weight.detach().clone()
            losses = super().accumulate_gradients()
            if 3 <= self.state.step < 8:
                losses[0] = math.nan
            return losses

    def train(config: PretrainConfig) -> Outputs:
        return pretrain.run(config, {"tokenize": corpus}, context, Poisoned)

    context = context_in(tmp_path)
    config = tiny_run("standard", max_nonfinite_in_a_row=3, checkpoint_every=100)
    message = rf"not finite in 3 steps in a row, the last one step 6 .*saved in {context.scratch_dir}/checkpoints"
    with pytest.raises(DivergedError, match=message):
        train(config)
    saved = {"model": {"embedding.weight": torch.zeros_like(weights_seen[3])}}
    load(saved, checkpoint_id=context.scratch_dir / "checkpoints" / "step-00000006", no_dist=True)
    assert torch.equal(saved["model"]["embedding.weight"], weights_seen[3])

    lower = PretrainConfig.model_validate({**config.model_dump(), "lr": 1e-3})
    with pytest.raises(UserError, match=r"written with lr=0.01, this run has lr=0.001; set it back, or delete"):
        train(lower)
    with pytest.raises(RuntimeError, match=r"not finite in 4 steps in a row, the last one step 7"):
        train(config)
    patient = PretrainConfig.model_validate({**config.model_dump(), "max_nonfinite_in_a_row": 6})
    outputs = train(patient)
    assert (outputs.facts.resumed_from, outputs.facts.nonfinite_steps) == (7, 5)


@pytest.mark.filterwarnings("ignore:step .*skipped. loss")
def test_giving_up_at_the_last_step_is_no_riddle_to_the_next_start(corpus: Artifact, tmp_path: Path) -> None:
    class Poisoned(Trainer):
        def accumulate_gradients(self) -> torch.Tensor:
            losses = super().accumulate_gradients()
            if self.state.step >= 3:
                losses[0] = math.nan
            return losses

    config = tiny_run("standard", steps=5, warmup_steps=1, max_nonfinite_in_a_row=2, checkpoint_every=100)
    with pytest.raises(DivergedError, match="the last one step 5"):
        pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path), Poisoned)
    with pytest.raises(RuntimeError, match="after 5 steps the validation loss is None; lower lr"):
        pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path), Poisoned)
