"""The loops that `lazypipe bench pretrain` sets beside ours, and the tokens they all train on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lazypipe.model.baselines import build_model
from lazypipe.model.loss import next_token_loss
from lazypipe.stages.contract import Artifact
from lazypipe.stages.data.shards import ShardWriter, write_documents
from lazypipe.stages.facts import SourceFacts, SplitFacts, TokenizeFacts
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.optimizer import build_optimizer, learning_rate, set_learning_rate


def bare_loop(
    config: PretrainConfig, vocab_size: int, batches: Sequence[Tensor], turn_steps: int, clock: Callable[[], float]
) -> tuple[Callable[[], float], list[float]]:
    """(a function that trains `turn_steps` more steps and returns the seconds, the list its losses go to)."""
    model = build_model(config.model, vocab_size, config.seed, config.kernel).to(compute_device())
    optimizer, steps, losses = build_optimizer(model, config), itertools.count(), list[float]()
    autocast = torch.autocast(compute_device().type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    micro_batches = config.micro_batches_per_step

    def turn() -> float:
        began = clock()
        for _ in range(turn_steps):
            step = next(steps)
            set_learning_rate(optimizer, learning_rate(step, config))
            total = torch.zeros((), device=compute_device())
            for windows in batches[step * micro_batches : (step + 1) * micro_batches]:
                with autocast:
                    loss = next_token_loss(model, windows.to(compute_device())) / micro_batches
                total += loss.detach()
                loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item())
        synchronise()
        return clock() - began

    return turn, losses


class _LossModel(nn.Module):
    """Our model as transformers.Trainer takes one: keyword arguments in, a loss out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor) -> dict[str, Tensor]:
        return {"loss": next_token_loss(self.model, windows)}  # type: ignore[arg-type]


def trainer_loop(
    config: PretrainConfig,
    vocab_size: int,
    batches: Sequence[Tensor],
    turn_steps: int,
    folder: Path,
    clock: Callable[[], float],
) -> Callable[[], float]:
    """A function that lets transformers.Trainer train a while and returns the seconds of `turn_steps` of its steps."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise()
            ends.append(clock())

    arguments: Any = TrainingArguments(
        output_dir=str(folder),
        max_steps=turn_steps + 1,  # the first also starts the loader; the clock runs from its end
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.micro_batches_per_step,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_epsilon=config.adam_eps,
        max_grad_norm=config.grad_clip,
        optim="adamw_torch_fused",
        bf16=config.dtype == "bfloat16",
        use_cpu=compute_device().type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=compute_device().type == "cuda",
        seed=config.seed,
    )
    rows = [{"windows": row} for batch in batches for row in batch]
    trainer: Any = Trainer(
        model=_LossModel(build_model(config.model, vocab_size, config.seed, config.kernel)),
        args=arguments,
        train_dataset=rows,
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)

    def turn() -> float:
        ends.clear()
        trainer.train()
        return ends[turn_steps] - ends[0]

    return turn


def random_corpus(directory: Path, vocab_size: int, config: PretrainConfig) -> Artifact:
    """A tokenize artifact of random tokens in real shards, enough for all steps: no loop sees a window twice."""
    drawn = np.random.default_rng(config.seed)
    needed = config.steps * config.tokens_per_step + 1
    for split, count in (("train", needed), ("validation", 8 * config.seq_len + 1)):
        writer = ShardWriter(directory / split, "shard", "uint32", shard_bytes=2**26)
        writer.append(drawn.integers(0, vocab_size, count))
        writer.close()
        write_documents(directory / split / "docs.arrow", [])
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    facts = TokenizeFacts(
        vocab_size=vocab_size,
        eos_id=0,
        eos_token="",
        token_dtype="uint32",
        splits={"train": SplitFacts(documents=0, tokens=needed, bytes=0, shards=[])},
        source=SourceFacts("random", "random", files=0, documents=0, skipped_rows=0, bytes=0, commit=None),
        filters={},
        units=None,
        invalid_utf8_bytes=0,
        document_length_histogram=[],
    )
    return Artifact(directory, {"facts": facts.to_json(), "metrics": {}})


def compute_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
