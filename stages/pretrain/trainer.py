"""The training loop: one optimizer step, and what is done between steps.

stages/data/batches.py -> train_step -> loss.py -> model/transformer.py      forward
                          train_step <- gradients.py                         backward, micro-batch by micro-batch
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Context, DivergedError, Interrupted
from lazypipe.stages.data.batches import Batches
from lazypipe.stages.pretrain.checkpoint.state import RunState
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.gradients import accumulate_gradients, sum_over_workers
from lazypipe.stages.pretrain.hardware import Machine, peak_memory_gb
from lazypipe.stages.pretrain.loss import mean_loss, training_loss
from lazypipe.stages.pretrain.metrics import (
    SAMPLE_EVERY,
    SAMPLE_WINDOWS,
    StepMetrics,
    attention_by_layer,
    means_over_layers,
    thresholds_by_layer,
)
from lazypipe.stages.pretrain.optimizer import learning_rate, set_learning_rate
from lazypipe.stages.pretrain.parallel import clip_gradients, gradient_norm
from lazypipe.stages.pretrain.skipping import divergence, reason_to_skip, record


@dataclass(kw_only=True)
class Trainer:
    """A model in training: what a step reads and what it changes.

    model, optimizer  on `device`; `state` says at which step they are
    batches           where the windows come from
    machine           what the speed is measured against
    save              commits a resume checkpoint: save(final=True) before training is left
    eos_id            end-of-document token; with it attention stays within documents
    already_logged    the last step whose metrics an earlier attempt has logged
    """

    config: PretrainConfig
    context: Context
    device: torch.device
    model: Transformer
    optimizer: torch.optim.Optimizer
    state: RunState
    batches: Batches
    machine: Machine
    save: Callable[..., None]
    eos_id: int | None = None
    already_logged: int = 0
    stop: bool = field(default=False, init=False)  # whether any worker was asked to stop, as of the last step
    batch_seconds: float = field(default=0.0, init=False)  # spent so far on making batches

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())
        self.ordered = self.config.reduction == "ordered" and self.context.world_size > 1
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def train(self) -> float:
        """Train to the last step; returns the validation loss after it.

        Raises Interrupted, with the state saved, when asked to stop; DivergedError when training diverges.
        """
        config, state = self.config, self.state
        validation_loss: float | None = None  # of the last step; none when that one was where a run gave up
        while state.step < config.steps:
            metrics = self.train_step()
            last = state.step == config.steps
            validate = last or state.step % config.validate_every == 0
            if validate:
                metrics.validation_loss = self.validation_loss()
            if validate or state.step % config.log_every == 0:
                self.log(metrics, validate)
            self.report_progress(metrics)
            if state.nonfinite_in_a_row >= config.max_nonfinite_in_a_row:
                self.give_up(metrics)
            if not last and (self.stop or state.step % config.checkpoint_every == 0):
                self.save(final=self.stop)
                if self.stop:
                    raise Interrupted(f"pretraining stopped at step {state.step} of {config.steps}; its state is saved")
            validation_loss = metrics.validation_loss
        if validation_loss is None or not math.isfinite(validation_loss) or state.loss is None:
            raise RuntimeError(
                f"after {config.steps} steps the validation loss is {validation_loss}; lower lr={config.lr}"
            )
        return validation_loss

    def train_step(self) -> StepMetrics:
        """One optimizer step on the next M micro-batches; the weights stay where the gradients are not to be used."""
        config, state = self.config, self.state
        started, waited_before = time.perf_counter(), self.batch_seconds
        lr = learning_rate(state.step, config)
        set_learning_rate(self.optimizer, lr)
        losses = self.accumulate_gradients()
        self.stop = sum_over_workers(self.parameters, losses, self.context, self.ordered)
        norm = gradient_norm(self.parameters, self.ordered)
        (loss, sink_balance, log_z_squared), grad_norm = losses.tolist(), norm.item()
        reason = reason_to_skip(state, loss, grad_norm, config.spike_sigma, config.spike_window)
        if reason is None:
            clip_gradients(self.parameters, config.grad_clip, norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        seconds, waited = time.perf_counter() - started, self.batch_seconds - waited_before
        state.train_seconds += seconds
        state.wait_seconds += waited
        if reason is not None:
            self.context.warn(f"skipped: {reason}", state.step)
        record(state, reason, loss, grad_norm, config.spike_window if config.spike_sigma is not None else 0)
        tokens_per_s = config.tokens_per_step / seconds
        return StepMetrics(
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=tokens_per_s,
            lr_tau_bias=config.tau_bias_lr_multiplier * lr if config.tau_bias_apart else None,
            sink_balance_loss=config.sink_balance * sink_balance if config.balances_sinks else None,
            z_loss=config.z_loss * log_z_squared if config.z_loss else None,
            step_seconds=seconds,
            data_wait=waited / seconds,
            mfu=self.machine.utilisation(tokens_per_s),
        )

    def accumulate_gradients(self) -> Tensor:
        """This worker's share of the gradients of the next step; returns its share of the loss's parts [3]."""
        with self.autocast:
            return accumulate_gradients(
                self.model, self.backward, self.config.micro_batches_per_step, self.context, self.ordered
            )

    def backward(self, micro_batch: int, weight: float = 1.0) -> Tensor:
        """Forward and backward pass of one micro-batch of the next step; see `gradients.Backward`."""
        config = self.config
        started = time.perf_counter()
        windows = self.batches.training(self.state.step * config.micro_batches_per_step + micro_batch)
        self.batch_seconds += time.perf_counter() - started
        objective, parts = training_loss(
            self.model,
            windows,
            self.eos_id,
            config.micro_batches_per_step,
            chunk_tokens=config.loss_chunk_tokens,
            z_loss=config.z_loss,
            sink_balance=config.sink_balance if config.balances_sinks else 0.0,
        )
        (objective if weight == 1.0 else weight * objective).backward()  # type: ignore[no-untyped-call]
        return parts

    def validation_loss(self) -> float:
        with self.autocast:
            return mean_loss(self.model, self.batches, self.eos_id, self.context, self.config.loss_chunk_tokens)

    def log(self, metrics: StepMetrics, validated: bool) -> None:
        """Add the step to the history and, unless an earlier attempt has, to the metrics of the context."""
        state, config = self.state, self.config
        metrics.peak_memory_gb = peak_memory_gb(self.device)
        by_layer = thresholds_by_layer(self.model)
        if validated or state.step % (SAMPLE_EVERY * config.log_every) == 0:
            with self.autocast:
                sample = self.batches.held_out_sample(SAMPLE_WINDOWS)
                by_layer |= attention_by_layer(self.model, sample, self.eos_id)
        row = metrics.row()
        state.history.append({"step": state.step, **row, **means_over_layers(by_layer, config.model)})
        if state.step > self.already_logged:
            measured = {name: value for name, value in row.items() if value is not None}
            self.context.log_metrics(state.step, measured | by_layer)

    def report_progress(self, metrics: StepMetrics) -> None:
        steps, state = self.config.steps, self.state
        self.context.progress(
            state.step,
            steps,
            "steps",
            loss=metrics.loss,
            tokens_per_s=metrics.tokens_per_s,
            eta_s=(steps - state.step) * state.train_seconds / state.step,
        )

    def give_up(self, metrics: StepMetrics) -> None:
        """Save the weights from before the steps that were not finite, and raise DivergedError."""
        saved_in = self.context.scratch_dir / "checkpoints"
        message = divergence(self.state, metrics.loss, metrics.grad_norm, metrics.lr, saved_in)
        try:
            self.save(final=True)
        except OSError as error:
            raise DivergedError(f"{message} (but of this step: {error})") from error
        raise DivergedError(message)
