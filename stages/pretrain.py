"""Pretraining: a language model from random initialisation, on one process or many.

Step s takes M = tokens_per_step / (micro_batch_size seq_len) micro-batches; micro-batch m holds the samples from
(s M + m) micro_batch_size on. Worker r of W computes micro-batches r, r + W, ...; gradients are summed over workers and
are the mean over M. So the data of a step depend on neither the number of workers nor on how often the run was
interrupted, and one worker on a CPU repeats a run bit for bit.

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
from torch import Tensor

from model.checkpoint import save_checkpoint
from model.config import ModelConfig
from model.loss import next_token_loss
from model.mixers.lazy import LazyAttention
from model.peers import PeerError, build_model, check_peer
from model.transformer import Transformer, count_parameters
from stages.batches import read_window, training_batch, validation_windows
from stages.configs import PretrainConfig
from stages.contract import Artifact, Context, Interrupted, Outputs, Refusal
from stages.optimizer import build_optimizer, learning_rate, set_learning_rate
from stages.resume import RunState, last_logged_step, read_resume_checkpoint, run_identity, write_resume_checkpoint
from stages.shards import TokenShards

MAX_NONFINITE_IN_A_ROW = 10
# Sparsity is measured on this many validation windows at validations and at every tenth logged step: 55 ms, 0.7 % of
# the quickstart's training time. Fixed windows make the curve smooth.
SPARSITY_WINDOWS = 2
SPARSITY_EVERY = 10


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
    if config.warmup_steps >= config.steps:
        warnings.warn(
            f"warmup_steps={config.warmup_steps} is not below steps={config.steps}: the learning rate only rises, to "
            f"{config.steps / config.warmup_steps:.3g} of lr={config.lr:g}",
            stacklevel=2,
        )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_peer(config.model, device)
    preflight = check_kernels(config, device)  # a kernel that is wrong on this GPU must not train for a month
    model = build_model(config.model, corpus.facts["vocab_size"], config.seed, config.kernel).to(device)
    if model.side is not None and side_text is not None:
        model.side.set_tokens(torch.from_numpy(side_text))
    optimizer = build_optimizer(model, config)
    identity = run_identity(config, corpus)
    state = resume(model, optimizer, identity, context)
    resumed_from = state.step
    already_logged = last_logged_step(context.output_dir / "metrics.jsonl") if context.rank == 0 else 0
    parameters = list(model.parameters())
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    while state.step < config.steps:
        started = time.perf_counter()
        lr = learning_rate(state.step, config)
        set_learning_rate(optimizer, lr)
        with autocast:
            loss = accumulate_gradients(model, config, train, state.step, context)
        stop = sum_over_workers(parameters, loss, context)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        loss_value, norm_value = loss.item(), norm.item()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm, foreach=True)
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
                validation_loss = mean_loss(model, config, validation, held_out, context)
        if validate or state.step % config.log_every == 0:
            numbers = {
                "loss": loss_value,
                "lr": lr,
                "grad_norm": norm_value,
                "tokens_per_s": config.tokens_per_step / seconds,
                "validation_loss": validation_loss,
            }
            with autocast:
                by_layer = lazy_numbers(model, config, validation, held_out, validate, state.step)
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
            if context.rank == 0:
                write = partial(
                    write_resume_checkpoint, model=model, optimizer=optimizer, state=state, identity=identity
                )
                context.save_checkpoint(state.step, write, keep=config.keep_checkpoints)
            if stop:
                if context.world_size > 1:
                    dist.barrier()  # a worker that leaves first may get the others killed before the save
                raise Interrupted(f"pretraining stopped at step {state.step} of {config.steps}; its state is saved")

    if validation_loss is None or not math.isfinite(validation_loss) or state.loss is None:
        raise RuntimeError(f"after {config.steps} steps the validation loss is {validation_loss}; lower lr={config.lr}")
    if context.rank == 0:
        tokenizer = corpus.path / "tokenizer" / "tokenizer.json"
        save_checkpoint(context.output_dir / "checkpoint", model, corpus.facts["eos_id"], tokenizer)
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
            "tokens": tokens,
            "nonfinite_steps": state.nonfinite_steps,
            "threads": torch.get_num_threads(),
            "device": device.type,
            "kernel": {"lazy": config.kernel, "standard": "sdpa"}.get(config.model.mixer, "torch"),
            "world_size": context.world_size,
            **preflight,
        },
    )


def refuse_peer(model: ModelConfig, device: torch.device) -> None:
    """Refusal when `model` is a peer and its package, or a GPU for it, is missing here."""
    try:
        check_peer(model, device)
    except PeerError as error:
        raise Refusal(str(error)) from error


def check_kernels(config: PretrainConfig, device: torch.device) -> dict[str, object]:
    """Facts of the kernel preflight: what will train, and how far it is from the float64 reference.

    Empty where no Triton kernel runs (no GPU, no lazy layer, another backend). RuntimeError when the error is large.
    """
    if device.type != "cuda" or config.model.mixer != "lazy" or config.kernel in ("reference", "blockwise"):
        return {}
    from kernels.preflight import preflight

    model = config.model
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    result = preflight(model.num_heads, model.kv_heads, model.head_dim, model.max_bias_length, dtype, device=device)
    return {"preflight": result.description, "preflight_errors": result.errors, "preflight_bound": result.bound}


def resume(model: Transformer, optimizer: torch.optim.AdamW, identity: dict[str, object], context: Context) -> RunState:
    """The state of the newest intact resume checkpoint, loaded; a fresh one without. All workers must find the same."""
    latest = context.latest_checkpoint(warn=partial(warnings.warn, stacklevel=2))
    step = 0 if latest is None else latest[0]
    if context.world_size > 1:
        if not dist.is_initialized() or dist.get_world_size() != context.world_size:
            raise RuntimeError(
                f"world_size={context.world_size}, but torch.distributed's process group is not initialised with as "
                "many workers; call torch.distributed.init_process_group first"
            )
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


def accumulate_gradients(
    model: Transformer, config: PretrainConfig, shards: TokenShards, step: int, context: Context
) -> Tensor:
    """Add this worker's share of the step's gradients to the parameters; returns its share of the mean loss, []."""
    device = model.embedding.weight.device
    micro_batches, size = config.micro_batches_per_step, config.micro_batch_size
    total = torch.zeros((), device=device)
    for micro_batch in range(context.rank, micro_batches, context.world_size):
        first_sample = (step * micro_batches + micro_batch) * size
        windows = training_batch(shards, config.seq_len, config.seed, first_sample, size)
        loss = next_token_loss(model, torch.from_numpy(windows).to(device)) / micro_batches
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def sum_over_workers(parameters: list[torch.nn.Parameter], loss: Tensor, context: Context) -> bool:
    """Sum gradients and loss over all workers, in place. True when any worker was asked to stop.

    One collective for everything: a worker without a micro-batch contributes zeros, and all learn of a stop at the
    same step.
    """
    if context.world_size == 1:
        return context.stop_requested
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    stop = torch.tensor([float(context.stop_requested)], device=loss.device)
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.reshape(1), stop])
    dist.all_reduce(flat)
    *sums, loss_sum, stop_sum = torch.split(flat, [*(gradient.numel() for gradient in gradients), 1, 1])
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient.view_as(parameter)
    loss.copy_(loss_sum[0])
    return bool(stop_sum > 0)


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


@torch.no_grad()
def mean_loss(
    model: Transformer, config: PretrainConfig, shards: TokenShards, windows: npt.NDArray[np.int64], context: Context
) -> float:
    """Mean next-token loss in nats over the given windows of seq_len tokens, batches shared out over the workers."""
    device = model.embedding.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    size = config.micro_batch_size
    for start in range(context.rank * size, len(windows), context.world_size * size):
        batch = np.stack([read_window(shards, config.seq_len, w) for w in windows[start : start + size]])
        total += next_token_loss(model, torch.from_numpy(batch).to(device), reduction="sum")
    if context.world_size > 1:
        dist.all_reduce(total)
    return total.item() / (len(windows) * config.seq_len)


def lazy_numbers(
    model: Transformer,
    config: PretrainConfig,
    shards: TokenShards,
    windows: npt.NDArray[np.int64],
    validate: bool,
    step: int,
) -> dict[str, float]:
    """tau by layer (mean over heads) and, now and then, the share of exactly-zero weights by layer; {} unless lazy."""
    numbers = {}
    for index, layer in enumerate(model.layers):
        if isinstance(layer.mixer, LazyAttention):
            numbers[f"tau/layer_{index}"] = layer.mixer.tau.mean().item()
    if numbers and (validate or step % (SPARSITY_EVERY * config.log_every) == 0):
        sample = np.stack([read_window(shards, config.seq_len, w)[:-1] for w in windows[:SPARSITY_WINDOWS]])
        shares = model.sparsity_by_layer(torch.from_numpy(sample).to(model.embedding.weight.device))
        numbers |= {f"sparsity/layer_{index}": share for index, share in enumerate(shares or []) if share is not None}
    return numbers


def summary(by_layer: dict[str, float], config: PretrainConfig) -> dict[str, float | None]:
    """Means over layers for the history table: tau_mean and sparsity of a lazy model, null where not measured."""
    if config.model.mixer != "lazy":
        return {}
    means: dict[str, float | None] = {}
    for column, prefix in (("tau_mean", "tau/"), ("sparsity", "sparsity/")):
        values = [value for name, value in by_layer.items() if name.startswith(prefix)]
        means[column] = sum(values) / len(values) if values else None
    return means
