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
import warnings
from collections.abc import Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from model.checkpoint import save_checkpoint
from model.peers import build_model
from model.transformer import Transformer, count_parameters
from stages.attempts import begin_attempt
from stages.batches import training_batch, validation_windows
from stages.before_training import check_kernels, kernel_used, warn_of_settings
from stages.contract import Artifact, Context, Interrupted, Outputs, Refusal
from stages.dtensors import whole_tensors
from stages.gradients import accumulate_gradients, sum_over_workers
from stages.lazy_numbers import lazy_numbers, summary
from stages.optimizer import build_optimizer, learning_rate, optimizer_tensors, set_learning_rate
from stages.parallel import check_process_group, clip_gradients, gradient_norm, is_sharded, place_model
from stages.peers import refuse_peer
from stages.pretrain_config import PretrainConfig
from stages.resume import RunState, last_logged_step, read_resume_checkpoint, run_identity, write_resume_checkpoint
from stages.shards import TokenShards
from stages.skipped_steps import count_nonfinite
from stages.training_numbers import step_numbers
from stages.window_losses import mean_loss


def run(config: PretrainConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs:
    """Train `config.model` on the tokenized corpus; see stages/contract.py for `context`.

    Writes checkpoint/ and tables/history, and logs loss, lr, grad_norm, tokens_per_s, validation_loss and, for lazy,
    tau and sparsity by layer. Refuses a corpus without a window of seq_len tokens and a resume checkpoint of another
    config. Raises Interrupted, with its state saved, when a stop is requested; RuntimeError when training diverges.
    """
    corpus = inputs["tokenize"]
    train, validation = TokenShards(corpus.path / "train"), TokenShards(corpus.path / "validation")
    held_out = validation_windows(validation, config.seq_len, config.validation_windows)
    side_text = first_tokens(train, config.model.max_seq_len) if config.model.mixer == "text_qk" else None
    training_batch(train, config.seq_len, config.seed, 0, 1)  # refuses a corpus too small before any compute
    warn_of_settings(config)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_peer(config.model, device)
    preflight = check_kernels(config, device)  # a kernel that is wrong on this GPU must not train for a month
    model = build_model(config.model, corpus.facts["vocab_size"], config.seed, config.kernel)
    if model.side is not None and side_text is not None:
        model.side.set_tokens(torch.from_numpy(side_text))
    check_process_group(context)
    model = place_model(model, config, device, context.world_size)
    optimizer = build_optimizer(model, config)
    identity = run_identity(config, corpus)
    state = resume(model, optimizer, identity, context)
    resumed_from = state.step
    attempts = begin_attempt(context, resumed_from)
    already_logged = last_logged_step(context.output_dir / "metrics.jsonl") if context.rank == 0 else 0
    parameters = list(model.parameters())
    eos_id = int(corpus.facts["eos_id"]) if config.document_masking else None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    while state.step < config.steps:
        started = time.perf_counter()
        lr = learning_rate(state.step, config)
        set_learning_rate(optimizer, lr)
        with autocast:
            losses = accumulate_gradients(model, config, train, state.step, context, eos_id)
        stop = sum_over_workers(parameters, losses, config, context)
        norm = gradient_norm(parameters, config)
        (loss_value, balance), norm_value = losses.tolist(), norm.item()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            clip_gradients(parameters, config.grad_clip, norm)
            optimizer.step()
        optimizer.zero_grad()
        state.step += 1
        seconds = time.perf_counter() - started
        state.train_seconds += seconds
        count_nonfinite(state, finite, loss_value, norm_value, lr)

        last = state.step == config.steps
        validate = last or state.step % config.validate_every == 0
        validation_loss = None
        if validate:
            with autocast:
                validation_loss = mean_loss(model, config, validation, held_out, context, eos_id)
        if validate or state.step % config.log_every == 0:
            numbers = step_numbers(config, loss_value, balance, lr, norm_value, seconds, validation_loss)
            with autocast:
                by_layer = lazy_numbers(model, config, validation, held_out, validate, state.step, eos_id)
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
        if not last and (stop or state.step % config.checkpoint_every == 0):
            weights = whole_tensors(model.state_dict(), keep=context.rank == 0)
            moments = whole_tensors(optimizer_tensors(optimizer, model), keep=context.rank == 0)
            if context.rank == 0:
                write = partial(
                    write_resume_checkpoint, weights=weights, optimizer=moments, state=state, identity=identity
                )
                context.save_checkpoint(state.step, write, keep=config.keep_checkpoints)
            if stop:
                if context.world_size > 1:
                    dist.barrier()  # a worker that leaves first may get the others killed before the save
                raise Interrupted(f"pretraining stopped at step {state.step} of {config.steps}; its state is saved")

    if validation_loss is None or not math.isfinite(validation_loss) or state.loss is None:
        raise RuntimeError(f"after {config.steps} steps the validation loss is {validation_loss}; lower lr={config.lr}")
    weights = whole_tensors(model.state_dict(), keep=context.rank == 0)
    if context.rank == 0:
        tokenizer = corpus.path / "tokenizer" / "tokenizer.json"
        save_checkpoint(context.output_dir / "checkpoint", model, corpus.facts["eos_id"], tokenizer, weights)
        context.log_table("history", state.history)
    total, non_embedding = count_parameters(model)
    tokens = config.steps * config.tokens_per_step
    return Outputs(
        metrics={
            "loss": state.loss,
            "validation_loss": validation_loss,
            "tokens_per_s": tokens / state.train_seconds,
            "train_seconds": state.train_seconds,
        },
        facts={
            "parameters": total,
            "non_embedding_parameters": non_embedding,
            "seq_len": config.seq_len,
            "steps": config.steps,
            "steps_executed": config.steps - resumed_from,
            "resumed_from": resumed_from,
            "attempts": attempts,
            "tokens": tokens,
            "document_masking": config.document_masking,
            "nonfinite_steps": state.nonfinite_steps,
            "threads": torch.get_num_threads(),
            "device": device.type,
            "kernel": kernel_used(config),
            "world_size": context.world_size,
            "parallel": "fsdp" if is_sharded(model) else "replicate",
            "reduction": config.reduction,
            **preflight,
        },
    )


def resume(model: Transformer, optimizer: torch.optim.AdamW, identity: dict[str, object], context: Context) -> RunState:
    """The state of the newest intact resume checkpoint, loaded; a fresh one without. All workers must find the same."""
    latest = context.latest_checkpoint(warn=partial(warnings.warn, stacklevel=2))
    step = 0 if latest is None else latest[0]
    if context.world_size > 1:
        found: list[int] = [0] * context.world_size
        dist.all_gather_object(found, step)
        if len(set(found)) > 1:
            raise Refusal(
                f"workers found resume checkpoints of different steps {found} in {context.scratch_dir}; "
                "all workers must share one storage root"
            )
    if latest is None:
        return RunState()
    return read_resume_checkpoint(latest[1], model, optimizer, identity)


def first_tokens(shards: TokenShards, count: int) -> npt.NDArray[np.int64]:
    """The side sequence of text_qk, int64 [count]; Refusal when the corpus has fewer tokens."""
    if shards.num_tokens < count:
        raise Refusal(
            f"text_qk takes the first max_seq_len={count} tokens of the training corpus, which has "
            f"{shards.num_tokens}; lower model.max_seq_len or add text"
        )
    return shards.read(0, count)
