"""The training loop on a model of one matrix and batches written by hand: a step, and what happens between steps."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.base import TokenMixer
from lazypipe.stages.contract import Context, DivergedError, Interrupted
from lazypipe.stages.data.batches import Windows
from lazypipe.stages.pretrain.checkpoint.state import RunState
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.hardware import Machine
from lazypipe.stages.pretrain.metrics import StepMetrics
from lazypipe.stages.pretrain.trainer import Trainer
from tests.stages.pretrain.toy_training import context_in, metric_lines

VOCAB = 5
CPU = torch.device("cpu")


class Bigrams(nn.Module):
    """Logits of the next token from the token alone: row `token` of the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.config, self.layers = VOCAB, ModelConfig(mixer="gla"), nn.ModuleList()
        self.mixers: list[TokenMixer] = []
        self.embedding = nn.Embedding(VOCAB, VOCAB, _weight=torch.zeros(VOCAB, VOCAB))

    def hidden(self, tokens: Tensor, **_: Any) -> Tensor:
        rows: Tensor = self.embedding(tokens)
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        return self.logits(self.hidden(tokens))


class ToyBatches:
    """Micro-batch n holds two windows that count upwards from n and from n + 1."""

    seq_len, size, held_out = 3, 2, np.arange(2)

    def __init__(self) -> None:
        self.read: list[int] = []

    def training(self, number: int) -> Windows:
        self.read.append(number)
        return (number + np.arange(2)[:, None] + np.arange(4)) % VOCAB

    def held_out_batch(self, number: int) -> Windows:
        return (number + np.arange(2)[:, None] + np.arange(4)) % VOCAB

    def held_out_sample(self, count: int) -> Windows:
        return self.held_out_batch(0)[:count]


def toy(folder: Path, trainer_type: type[Trainer] = Trainer, **fields: Any) -> tuple[Trainer, list[tuple[int, bool]]]:
    """A trainer of `Bigrams` by SGD, two micro-batches a step, and the (step, final) of its saves."""
    batch = {"seq_len": 3, "micro_batch_size": 2, "tokens_per_step": 12}
    settings = {"steps": 4, "warmup_steps": 0, "lr": 0.5, "schedule": "constant", "checkpoint_every": 100, **batch}
    config = PretrainConfig.model_validate({**settings, **fields})
    model, saves = Bigrams(), list[tuple[int, bool]]()
    trainer = trainer_type(
        config=config,
        context=context_in(folder),
        device=CPU,
        model=model,  # type: ignore[arg-type]
        optimizer=torch.optim.SGD(model.parameters(), lr=config.lr),
        state=RunState(),
        batches=ToyBatches(),  # type: ignore[arg-type]
        machine=Machine(None, 1, 0.0, None),
        save=lambda final: saves.append((trainer.state.step, final)),
    )
    return trainer, saves


def expected_gradient(weight: Tensor, numbers: tuple[int, ...]) -> tuple[float, Tensor]:
    """Mean cross-entropy over micro-batches, and its gradient."""
    weight = weight.detach().clone().requires_grad_()
    windows = torch.from_numpy(np.concatenate([ToyBatches().training(number) for number in numbers]))
    loss = F.cross_entropy(weight[windows[:, :-1]].flatten(0, 1), windows[:, 1:].flatten())
    loss.backward()
    assert weight.grad is not None
    return loss.item(), weight.grad


def test_a_step_descends_along_the_mean_gradient_of_its_micro_batches(tmp_path: Path) -> None:
    trainer, _ = toy(tmp_path, grad_clip=100.0)
    for step in range(2):
        before = trainer.model.embedding.weight.detach().clone()
        loss, gradient = expected_gradient(before, (2 * step, 2 * step + 1))
        metrics = trainer.train_step()
        assert metrics.loss == pytest.approx(loss) and metrics.grad_norm == pytest.approx(gradient.norm().item())
        torch.testing.assert_close(trainer.model.embedding.weight, before - 0.5 * gradient)
    assert trainer.batches.read == [0, 1, 2, 3]  # type: ignore[attr-defined]
    assert trainer.state.step == 2 and trainer.state.loss == metrics.loss
    assert trainer.model.embedding.weight.grad is None


def test_a_gradient_above_grad_clip_is_scaled_down_to_it(tmp_path: Path) -> None:
    trainer, _ = toy(tmp_path, grad_clip=0.01)
    metrics = trainer.train_step()
    assert metrics.grad_norm > 0.1  # as it was
    assert trainer.model.embedding.weight.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_z_loss_is_added_to_the_objective_and_reported_beside_the_loss(tmp_path: Path) -> None:
    trainer, _ = toy(tmp_path, z_loss=0.25)
    metrics = trainer.train_step()  # all logits are 0: log Z = log V
    assert metrics.loss == pytest.approx(math.log(VOCAB))
    assert metrics.z_loss == pytest.approx(0.25 * math.log(VOCAB) ** 2)


class Poisoned(Trainer):
    """Steps 2 and 3 have no finite loss."""

    def backward(self, micro_batch: int, weight: float = 1.0) -> Tensor:
        parts = super().backward(micro_batch, weight)
        return parts * math.nan if self.state.step in (1, 2) else parts


@pytest.mark.filterwarnings("ignore:step .*skipped")
def test_a_skipped_step_costs_its_batch_and_nothing_else(tmp_path: Path) -> None:
    trainer, _ = toy(tmp_path, Poisoned)
    weights, losses = [], []
    for _ in range(4):
        losses.append(trainer.train_step().loss)
        weights.append(trainer.model.embedding.weight.detach().clone())
    assert [math.isnan(loss) for loss in losses] == [False, True, True, False]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert trainer.batches.read == [*range(8)]  # type: ignore[attr-defined]
    assert (trainer.state.nonfinite_steps, trainer.state.nonfinite_in_a_row) == (2, 0)


@pytest.mark.filterwarnings("ignore:step .*skipped")
def test_giving_up_saves_first_and_says_where_also_on_a_full_disk(tmp_path: Path) -> None:
    trainer, saves = toy(tmp_path, Poisoned, max_nonfinite_in_a_row=2)
    with pytest.raises(DivergedError, match=r"2 steps in a row, the last one step 3 .* saved in .*/checkpoints"):
        trainer.train()
    assert saves == [(3, True)]

    trainer, _ = toy(tmp_path, Poisoned, max_nonfinite_in_a_row=2)

    def no_room(final: bool) -> None:
        raise OSError(f"no room, final={final}")

    trainer.save = no_room
    with pytest.raises(DivergedError, match=r"but of this step: no room, final=True"):
        trainer.train()


def test_the_loop_validates_logs_and_saves_at_its_intervals(tmp_path: Path) -> None:
    trainer, saves = toy(tmp_path, steps=9, validate_every=4, log_every=3, checkpoint_every=2)
    loss = trainer.train()
    assert saves == [(2, False), (4, False), (6, False), (8, False)]
    lines = {line["step"]: line["metrics"] for line in metric_lines(trainer.context)}
    assert [*lines] == [3, 4, 6, 8, 9]
    assert [step for step, metrics in lines.items() if "validation_loss" in metrics] == [4, 8, 9]
    assert lines[9]["validation_loss"] == loss < math.log(VOCAB)
    history = trainer.state.history
    assert [row["step"] for row in history] == [*lines] and history[0]["validation_loss"] is None
    assert {"z_loss", "lr_tau_bias", "sink_balance_loss", "mfu"}.isdisjoint(history[-1])


def test_steps_that_were_logged_before_a_resume_are_not_logged_again(tmp_path: Path) -> None:
    trainer, _ = toy(tmp_path)
    trainer.already_logged = 2
    trainer.train()
    assert [line["step"] for line in metric_lines(trainer.context)] == [3, 4]
    assert [row["step"] for row in trainer.state.history] == [1, 2, 3, 4]


def test_a_stop_saves_at_the_end_of_the_step(tmp_path: Path) -> None:
    class Asked(Context):
        stop_requested = True

    trainer, saves = toy(tmp_path)
    trainer.context = Asked(trainer.context.output_dir, trainer.context.scratch_dir)
    with pytest.raises(Interrupted, match="stopped at step 1 of 4"):
        trainer.train()
    assert saves == [(1, True)]


def test_a_row_has_null_for_what_is_not_finite_and_no_column_that_the_run_lacks() -> None:
    step = {"lr": 0.1, "tokens_per_s": 1.0, "step_seconds": 1.0, "data_wait": 0.0}
    row = StepMetrics(loss=math.nan, grad_norm=math.inf, z_loss=math.nan, **step).row()
    assert row["loss"] is row["grad_norm"] is row["z_loss"] is row["validation_loss"] is None
    assert "mfu" not in row and row["lr"] == 0.1


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_the_rate_of_tau_and_bias_is_told_where_it_is_another_one(tmp_path: Path, multiplier: float) -> None:
    trainer, _ = toy(tmp_path, model={"mixer": "lazy"}, tau_bias_lr_multiplier=multiplier)
    row = trainer.train_step().row()
    assert row["lr"] == 0.5 and row.get("lr_tau_bias") == {1.0: None, 2.0: 1.0}[multiplier]
