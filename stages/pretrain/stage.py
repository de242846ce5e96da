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

import math
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from lazypipe.model.baselines import build_model
from lazypipe.model.checkpoint import save_checkpoint
from lazypipe.model.transformer import count_parameters
from lazypipe.stages.baselines import refuse_baseline
from lazypipe.stages.contract import METRICS_FILE, Artifact, Context, DivergedError, Interrupted, Outputs, UserError
from lazypipe.stages.data.batches import training_batch, validation_windows
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.facts import PretrainFacts, TokenizeFacts
from lazypipe.stages.pretrain.attempts import begin_attempt
from lazypipe.stages.pretrain.checkpoint.saver import CheckpointSaver
from lazypipe.stages.pretrain.checkpoint.state import last_logged_step, run_identity
from lazypipe.stages.pretrain.checks import check_compiler, check_kernels, kernel_used, warn_of_settings
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.determinism import deterministic_if_asked
from lazypipe.stages.pretrain.dtensors import whole_tensors
from lazypipe.stages.pretrain.gradients import accumulate_gradients, sum_over_workers
from lazypipe.stages.pretrain.layer_metrics import attention_numbers, summary
from lazypipe.stages.pretrain.loss import mean_loss
from lazypipe.stages.pretrain.metrics import UNKNOWN, machine, run_numbers, speed_numbers, step_numbers
from lazypipe.stages.pretrain.optimizer import build_optimizer, set_learning_rate
from lazypipe.stages.pretrain.parallel import (
    check_process_group,
    clip_gradients,
    gradient_norm,
    is_sharded,
    place_model,
)
from lazypipe.stages.pretrain.schedule import learning_rate
from lazypipe.stages.pretrain.skipping import diverged, divergence, reason_to_skip, record


@deterministic_if_asked
def run(config: PretrainConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs[PretrainFacts]:
    """Train `config.model` on the tokenized corpus; see stages/contract.py for `context`.

    Writes checkpoint/ and tables/history, and logs losses, gradient norm, speed and memory (stages/pretrain/metrics.py)
    and by layer tau, sparsity and sink (stages/pretrain/layer_metrics.py). Refuses a corpus without a window of seq_len
    tokens and a resume checkpoint of another config. Raises Interrupted, with its state saved, when asked to stop;
    DivergedError when training diverges.
    """
    with CheckpointSaver(config, context) as saver:
        return train_with(saver, config, inputs, context)


def train_with(
    saver: CheckpointSaver, config: PretrainConfig, inputs: Mapping[str, Artifact], context: Context
) -> Outputs[PretrainFacts]:
    """The body of `run`."""
    corpus = inputs["tokenize"]
    corpus_facts = TokenizeFacts.read(corpus.manifest)
    train, validation = TokenShards(corpus.path / "train"), TokenShards(corpus.path / "validation")
    held_out = validation_windows(validation, config.seq_len, config.validation_windows)
    side_text = first_tokens(train, config.model.max_seq_len) if config.model.mixer == "text_qk" else None
    training_batch(train, config.seq_len, config.seed, 0, 1)  # refuses a corpus too small before any compute
    warn_of_settings(config, context.world_size, context.warn)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_baseline(config.model, device)
    check_compiler(config, device)
    checked = check_kernels(config, device)  # a kernel that is wrong on this GPU must not train for a month
    model = build_model(config.model, corpus_facts.vocab_size, config.seed, config.kernel)
    if model.side is not None and side_text is not None:
        model.side.set_tokens(torch.from_numpy(side_text))
    if config.compile:
        torch.compiler.reset()  # what a model before this one in the same process left counts towards torch's limit
    model.prepare_training(config.activation_checkpointing, "inductor" if config.compile else None)
    check_process_group(context)
    model = place_model(model, config, device, context.world_size)
    optimizer = build_optimizer(model, config)
    identity = run_identity(config, corpus)
    state = saver.resume(model, optimizer, identity)
    resumed_from = state.step
    attempts = begin_attempt(context, resumed_from)
    already_logged = last_logged_step(context.output_dir / METRICS_FILE) if context.rank == 0 else 0
    parameters = list(model.parameters())
    eos_id = corpus_facts.eos_id if config.document_masking else None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    under = machine(config, corpus_facts.vocab_size, device, context.world_size)

    validation_loss: float | None = None  # of the last step; none when that one was where a run gave up
    while state.step < config.steps:
        started, waited_before = time.perf_counter(), train.batch_seconds
        lr = learning_rate(state.step, config)
        set_learning_rate(optimizer, lr)
        with autocast:
            losses = accumulate_gradients(model, config, train, state.step, context, eos_id)
        stop = sum_over_workers(parameters, losses, config, context)
        norm = gradient_norm(parameters, config)
        (loss_value, balance, log_z), norm_value = losses.tolist(), norm.item()
        reason = reason_to_skip(state, config, loss_value, norm_value)
        if reason is None:
            clip_gradients(parameters, config.grad_clip, norm)
            optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        seconds = time.perf_counter() - started
        state.train_seconds += seconds
        waited = train.batch_seconds - waited_before
        state.wait_seconds += waited
        if reason is not None:
            context.warn(f"skipped: {reason}", state.step)
        record(state, config, reason, loss_value, norm_value)
        gave_up = diverged(state, config)

        last = state.step == config.steps
        validate = last or state.step % config.validate_every == 0
        validation_loss = None
        if validate:
            with autocast:
                validation_loss = mean_loss(model, config, validation, held_out, context, eos_id)
        if validate or state.step % config.log_every == 0:
            numbers = step_numbers(config, loss_value, balance, log_z, lr, norm_value, seconds, validation_loss)
            numbers |= speed_numbers(config, under, seconds, waited, device)
            with autocast:
                by_layer = attention_numbers(model, config, validation, held_out, validate, state.step, eos_id)
            measured = {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
            columns = {name: measured.get(name) for name in numbers} | summary(by_layer, config)
            state.history.append({"step": state.step, **columns})
            if state.step > already_logged:
                context.log_metrics(state.step, measured | by_layer)
        context.progress(
            state.step,
            config.steps,
            "steps",
            loss=loss_value,
            tokens_per_s=config.tokens_per_step / seconds,
            eta_s=(config.steps - state.step) * state.train_seconds / state.step,
        )
        if gave_up:
            message = divergence(state, loss_value, norm_value, lr, context.scratch_dir / "checkpoints")
            try:
                saver.save(model, optimizer, state, identity, final=True)
            except OSError as error:
                raise DivergedError(f"{message} (but of this step: {error})") from error
            raise DivergedError(message)
        if not last and (stop or state.step % config.checkpoint_every == 0):
            saver.save(model, optimizer, state, identity, final=stop)
            if stop:
                raise Interrupted(f"pretraining stopped at step {state.step} of {config.steps}; its state is saved")

    if validation_loss is None or not math.isfinite(validation_loss) or state.loss is None:
        raise RuntimeError(f"after {config.steps} steps the validation loss is {validation_loss}; lower lr={config.lr}")
    weights = whole_tensors(model.state_dict(), keep=context.rank == 0)
    if context.rank == 0:
        tokenizer = corpus.path / "tokenizer" / "tokenizer.json"
        save_checkpoint(context.output_dir / "checkpoint", model, corpus_facts.eos_id, tokenizer, weights)
        context.log_table("history", state.history)
        context.flush_metrics()
    total, non_embedding = count_parameters(model)
    tokens = config.steps * config.tokens_per_step
    return Outputs(
        metrics={
            "loss": state.loss,
            "validation_loss": validation_loss,
            "tokens_per_s": tokens / state.train_seconds,
            "train_seconds": state.train_seconds,
            **run_numbers(under, tokens, state.train_seconds, state.wait_seconds, device),
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
            device=device.type,
            kernel=kernel_used(config),
            world_size=context.world_size,
            parallel="fsdp" if is_sharded(model) else "replicate",
            reduction=config.reduction,
            gpu=under.gpu or "none",
            flops_per_token=under.flops_per_token,
            peak_flops=UNKNOWN if under.peak_flops is None else under.peak_flops,
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
