"""Held-out loss of a trained model, its perplexity at several context lengths, some of its own text, and benchmarks.

Each part is in a file of its own: perplexity.py, length_extrapolation.py, probes.py, benchmarks/.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lazypipe.model.checkpoint import Checkpoint
from lazypipe.model.generate import generate
from lazypipe.stages.contract import Artifact, Context, Outputs, UserError
from lazypipe.stages.data.batches import count_windows
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate import length_extrapolation, perplexity, probes
from lazypipe.stages.evaluate.ablation import refuse_uniform
from lazypipe.stages.evaluate.benchmarks import run as benchmarks
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.evaluate.probe_sequences import Ids, refuse_small_vocabulary, usable_tokens
from lazypipe.stages.evaluate.token_bytes import byte_scale, token_byte_counts
from lazypipe.stages.facts import EvaluateFacts, PretrainFacts, TokenizeFacts
from lazypipe.stages.model_checks import check_inference_kernels, load_model, refuse_baseline


def run(config: EvaluateConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs[EvaluateFacts]:
    """Score the model on the validation split, let it continue the prompts, and run the benchmarks asked for.

    Writes tables/continuations and what perplexity.measure, length_extrapolation.measure, probes.measure and
    benchmarks.run_tasks write. Refuses, before any compute, a length for which the split holds no window, probes that
    take more different tokens than there are, a benchmark that cannot be read, a baseline without its package or
    a GPU, and Triton kernels that are wrong on this GPU. Leaves global random states alone.
    """
    corpus, trained = inputs["tokenize"], inputs["pretrain"]
    shards = TokenShards(corpus.path / "validation")
    corpus_facts, training = TokenizeFacts.read(corpus.manifest), PretrainFacts.read(trained.manifest)
    trained_length = training.seq_len
    refuse_missing_windows(
        shards, [("evaluate.extrapolation.context_lengths", trained_length), *config.window_lengths()]
    )
    tokenizer_json = corpus.path / "tokenizer" / "tokenizer.json"
    table = token_byte_counts(tokenizer_json, corpus_facts.vocab_size)
    usable = probe_tokens(config, shards, table)
    if config.tasks:
        benchmarks.check_tasks(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load_checked(config, trained.path / "checkpoint", device)
    model = checkpoint.model
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    preflight = check_inference_kernels(model, dtype)  # a kernel that is wrong on this GPU gives a wrong loss silently

    scale = byte_scale(table, shards, corpus_facts.splits["validation"].bytes)
    bytes_of_token = np.multiply(table, scale, dtype=np.float64)
    eos_id = checkpoint.eos_id if training.document_masking else None
    if eos_id is not None:
        warn_of_borders(config, context)
    where = (trained_length, config.batch_tokens, device, context)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        metrics, tokens = perplexity.measure(config, model, shards, bytes_of_token, eos_id, trained_length, context)
        context.log_table("continuations", continue_prompts(config, checkpoint, tokenizer_json))
        same_tokens = config.extrapolation.same_tokens
        if same_tokens is not None:
            metrics |= length_extrapolation.measure(config.extrapolation, same_tokens, model, shards, *where)
        if usable is not None:
            metrics |= probes.measure(config.probes, model, shards, usable, *where)
    scored = benchmarks.run_tasks(config, checkpoint, tokenizer_json, context) if config.tasks else None
    facts = EvaluateFacts(
        max_seq_len=model.config.max_seq_len,
        seq_len=trained_length,
        validation_tokens_scored=tokens,
        byte_scale=scale,
        threads=torch.get_num_threads(),
        device=device.type,
        tasks=None if scored is None else scored.counts,
        lm_eval=None if scored is None else scored.lm_eval,
        preflight=None if preflight is None else preflight.description,
        preflight_errors=None if preflight is None else preflight.errors,
        preflight_bound=None if preflight is None else preflight.bound,
    )
    return Outputs(metrics if scored is None else metrics | scored.metrics, facts)


def refuse_missing_windows(shards: TokenShards, lengths: list[tuple[str, int]]) -> None:
    """UserError naming the first (key, length) that is longer than the validation split."""
    for key, length in lengths:
        if count_windows(shards.num_tokens, length) == 0:
            raise UserError(
                f"{key} holds {length}, but the validation split has {shards.num_tokens} tokens and one "
                f"window of {length} needs {length + 1}; drop that length, or raise tokenize.validation_fraction"
            )


def probe_tokens(config: EvaluateConfig, shards: TokenShards, table: npt.NDArray[np.int64]) -> Ids | None:
    """The tokens that probes are made of, None without probes; UserError when they are too few.

    table: bytes of text by token id, int64 [V].
    """
    if not config.probes.lengths:
        return None
    usable = usable_tokens(shards, table)
    refuse_small_vocabulary(config.probes, len(usable))
    return usable


def load_checked(config: EvaluateConfig, directory: Path, device: torch.device) -> Checkpoint:
    """The trained model; UserError where it cannot be computed here, or not what the config asks of it."""
    checkpoint = load_model(directory, device)
    model = checkpoint.model.config
    refuse_baseline(model, device)
    for key, length in config.window_lengths():
        too_long = model.too_long(length)
        if too_long is not None:
            raise UserError(f"{key}: {too_long}")
    if config.ablations:
        refuse_uniform(model)
    return checkpoint


def warn_of_borders(config: EvaluateConfig, context: Context) -> None:
    """Warn of the parts that do not keep within documents, as a model trained with document_masking does."""
    if config.extrapolation.same_tokens or config.probes.lengths:
        context.warn(
            "trained with document_masking, but extrapolation over the same tokens and probes read on across document "
            "borders: compare them with each other, not with perplexity_at"
        )


def continue_prompts(config: EvaluateConfig, checkpoint: Checkpoint, tokenizer_json: Path) -> list[dict[str, str]]:
    """Rows {prompt, method, text}: each prompt continued greedily and by sampling, up to the end of the document.

    An empty prompt starts a new document, from the end-of-document token. A model that takes no more than max_seq_len
    tokens stops there.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    device = checkpoint.model.embedding.weight.device
    rows = []
    for prompt in config.prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [checkpoint.eos_id]
        new_tokens = config.max_new_tokens
        if checkpoint.model.config.too_long(len(ids) + new_tokens) is not None:
            new_tokens = max(0, checkpoint.model.config.max_seq_len - len(ids))
        for method, temperature in (("greedy", 0.0), ("sampled", config.temperature)):
            # The same seed for every prompt: a continuation does not depend on the prompts before it.
            whole = generate(
                checkpoint.model,
                torch.tensor([ids], device=device),
                new_tokens,
                temperature,
                config.top_k,
                torch.Generator().manual_seed(config.seed),
                stop_token=checkpoint.eos_id,
            )[0].tolist()
            # Decoded with its prompt, so that a SentencePiece continuation keeps its leading space.
            text = tokenizer.decode(whole).removeprefix(tokenizer.decode(ids))
            rows.append({"prompt": prompt, "method": method, "text": text})
    return rows
