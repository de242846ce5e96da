"""Pretraining: a language model from random initialisation, on one process or many.

Step s takes M = tokens_per_step / (micro_batch_size seq_len) micro-batches; micro-batch m holds the samples from
(s M + m) micro_batch_size on. Worker r of W computes micro-batches r, r + W, ...; gradients are summed over workers and
are the mean over M. So the data of a step depend on neither the number of workers nor on how often the run was
interrupted, and one worker on a CPU repeats a run bit for bit.

Windows are stretches of the token stream, and attention runs across the document borders inside them, unless
document_masking confines it: the windows of a micro-batch are then packed as one row, cut at window borders and behind
end-of-document tokens. The validation loss is measured under the same masking.

With more than one worker the caller has initialised torch.distributed's default process group, and all workers see one
scratch_dir.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lazypipe.model.baselines import build_model
from lazypipe.model.checkpoint import save_checkpoint
from lazypipe.model.transformer import Transformer, count_parameters
from lazypipe.stages.attempts import begin_attempt
from lazypipe.stages.contract import METRICS_FILE, Artifact, Context, Outputs, UserError
from lazypipe.stages.data.batches import Batches, validation_windows
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.facts import Attempt, PretrainFacts, TokenizeFacts
from lazypipe.stages.model_checks import refuse_baseline
from lazypipe.stages.pretrain.checkpoint.saver import CheckpointSaver
from lazypipe.stages.pretrain.checkpoint.state import last_logged_step, run_identity
from lazypipe.stages.pretrain.checks import check_compiler, check_kernels, kernel_used, warn_of_settings
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.determinism import deterministic
from lazypipe.stages.pretrain.hardware import UNKNOWN, machine_of
from lazypipe.stages.pretrain.metrics import run_metrics
from lazypipe.stages.pretrain.optimizer import build_optimizer
from lazypipe.stages.pretrain.parallel import check_process_group, is_sharded, place_model, whole_tensors
from lazypipe.stages.pretrain.trainer import Trainer

if TYPE_CHECKING:  # imports triton
    from lazypipe.kernels.gpu.preflight import Preflight


def run(
    config: PretrainConfig,
    inputs: Mapping[str, Artifact],
    context: Context,
    trainer_type: type[Trainer] = Trainer,
) -> Outputs[PretrainFacts]:
    """Train `config.model` on the tokenized corpus; see stages/contract.py for `context`.

    Writes checkpoint/ and tables/history, and logs losses, gradient norm, speed and memory, and by layer tau, sparsity
    and sink (stages/pretrain/metrics.py). Refuses a corpus without a window of seq_len tokens and a resume checkpoint
    of another config. Raises Interrupted, with its state saved, when asked to stop; DivergedError when training
    diverges.
    """
    corpus = inputs["tokenize"]
    tokenized = TokenizeFacts.read(corpus.manifest)
    with (
        deterministic(config.deterministic, config.model.mixer, context.warn),
        CheckpointSaver(
            context,
            keep=config.keep_checkpoints,
            keep_every=config.keep_checkpoint_every,
            in_background=config.async_checkpoints,
        ) as saver,
    ):
        batches = open_batches(config, corpus.path)
        warn_of_settings(config, context.world_size, context.warn)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        refuse_baseline(config.model, device)
        if config.compile:
            check_compiler(device)
        # A kernel that is wrong on this GPU must not train for a month.
        checked = check_kernels(config.model, config.kernel, config.dtype, device)
        check_process_group(context)
        model = model_to_train(config, tokenized.vocab_size, batches.train, device, context.world_size)
        optimizer = build_optimizer(model, config)
        identity = run_identity(config, corpus)
        state = saver.resume(model, optimizer, identity)
        resumed_from = state.step
        attempts = begin_attempt(context, resumed_from)
        trainer = trainer_type(
            config=config,
            context=context,
            device=device,
            model=model,
            optimizer=optimizer,
            state=state,
            batches=batches,
            machine=machine_of(
                config.model,
                tokenized.vocab_size,
                seq_len=config.seq_len,
                micro_batch_size=config.micro_batch_size,
                dtype=config.dtype,
                device=device,
                workers=context.world_size,
            ),
            save=partial(saver.save, model, optimizer, state, identity),
            eos_id=tokenized.eos_id if config.document_masking else None,
            already_logged=last_logged_step(context.output_dir / METRICS_FILE) if context.rank == 0 else 0,
        )
        validation_loss = trainer.train()
        write_outputs(trainer, tokenized.eos_id, corpus.path)
    return outputs_of(trainer, validation_loss, resumed_from, attempts, checked)


def open_batches(config: PretrainConfig, corpus: Path) -> Batches:
    """The batches of a tokenized corpus; UserError when a split has no window of seq_len predictions."""
    train, validation = TokenShards(corpus / "train"), TokenShards(corpus / "validation")
    batches = Batches(
        train=train,
        validation=validation,
        held_out=validation_windows(validation, config.seq_len, config.validation_windows),
        seq_len=config.seq_len,
        size=config.micro_batch_size,
        seed=config.seed,
    )
    batches.training(0)  # refuses a corpus too small before any compute
    return batches


def model_to_train(
    config: PretrainConfig, vocab_size: int, train: TokenShards, device: torch.device, world_size: int
) -> Transformer:
    """The model of `config`, initialised, on `device`, sharded and compiled as the config says."""
    takes_text = config.model.mechanism.side_sequence == "text"
    side_text = first_tokens(train, config.model.max_seq_len) if takes_text else None
    model = build_model(config.model, vocab_size, config.seed, config.kernel)
    if model.side is not None and side_text is not None:
        model.side.set_tokens(torch.from_numpy(side_text))
    if config.compile:
        torch.compiler.reset()  # what a model before this one in the same process left counts towards torch's limit
    model.prepare_training(config.activation_checkpointing, "inductor" if config.compile else None)
    ordered = config.reduction == "ordered"
    return place_model(model, device, world_size, parallel=config.parallel, dtype=config.dtype, ordered=ordered)


def write_outputs(trainer: Trainer, eos_id: int, corpus: Path) -> None:
    """The trained model and the history of its steps; all workers call it, worker 0 writes."""
    context = trainer.context
    weights = whole_tensors(trainer.model.state_dict(), keep=context.rank == 0)
    if context.rank != 0:
        return
    tokenizer = corpus / "tokenizer" / "tokenizer.json"
    save_checkpoint(context.output_dir / "checkpoint", trainer.model, eos_id, tokenizer, weights)
    context.log_table("history", trainer.state.history)
    context.flush_metrics()


def outputs_of(
    trainer: Trainer,
    validation_loss: float,
    resumed_from: int,
    attempts: list[Attempt],
    checked: Preflight | None,
) -> Outputs[PretrainFacts]:
    """Final metrics and facts of a run that went on from step `resumed_from`; checked: by `check_kernels`."""
    config, state, machine = trainer.config, trainer.state, trainer.machine
    assert state.loss is not None
    total, non_embedding = count_parameters(trainer.model)
    tokens = config.steps * config.tokens_per_step
    return Outputs(
        metrics={
            "loss": state.loss,
            "validation_loss": validation_loss,
            **run_metrics(machine, tokens, state.train_seconds, state.wait_seconds, trainer.device),
        },
        facts=PretrainFacts(
            parameters=total,
            non_embedding_parameters=non_embedding,
            seq_len=config.seq_len,
            steps=config.steps,
            steps_executed=config.steps - resumed_from,
            resumed_from=resumed_from,
            attempts=attempts,
            tokens=tokens,
            document_masking=config.document_masking,
            nonfinite_steps=state.nonfinite_steps,
            spikes_skipped=state.spikes_skipped,
            threads=torch.get_num_threads(),
            device=trainer.device.type,
            kernel=kernel_used(config.model, config.kernel),
            world_size=trainer.context.world_size,
            parallel="fsdp" if is_sharded(trainer.model) else "replicate",
            reduction=config.reduction,
            gpu=machine.gpu or "none",
            flops_per_token=machine.flops_per_token,
            peak_flops=UNKNOWN if machine.peak_flops is None else machine.peak_flops,
            preflight=None if checked is None else checked.description,
            preflight_errors=None if checked is None else checked.errors,
            preflight_bound=None if checked is None else checked.bound,
        ),
    )


def first_tokens(shards: TokenShards, count: int) -> npt.NDArray[np.int64]:
    """The side sequence of text_qk, int64 [count]; UserError when the corpus has fewer tokens."""
    if shards.num_tokens < count:
        raise UserError(
            f"text_qk takes the first max_seq_len={count} tokens of the training corpus, which has "
            f"{shards.num_tokens}; lower model.max_seq_len or add text"
        )
    return shards.read(0, count)
