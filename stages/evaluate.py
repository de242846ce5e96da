"""Held-out loss of a trained model, its perplexity at several context lengths, some of its own text, and benchmarks.

A context length L cuts the validation tokens into windows that share no prediction: window w predicts tokens
w L + 1 ... w L + L, each from the tokens of its window before it. So the average prediction at L sees about L / 2
tokens, and curves over L say what longer context is worth. The headline numbers are those at the trained length.

A model trained with document_masking is scored with it: the tokens of the window before a prediction then count from
the last document border.

Bits per byte = nats / ln 2 / bytes of text of the predicted tokens, which end-of-document tokens add nothing to: a
number that models with different tokenizers can be compared by.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.checkpoint import Checkpoint
from model.generate import generate
from model.loss import next_token_loss
from model.transformer import Transformer
from stages import benchmarks, length_extrapolation, probes
from stages.batches import count_windows, document_borders, read_window, validation_windows
from stages.configs import EvaluateConfig
from stages.contract import Artifact, Context, Interrupted, Outputs, Refusal
from stages.peers import load_model, refuse_peer
from stages.probe_sequences import refuse_small_vocabulary, usable_tokens
from stages.shards import TokenShards
from stages.skip import ablated, refuse_uniform
from stages.token_bytes import byte_scale, token_byte_counts


class Score(NamedTuple):
    """Sums over the predictions of some windows. nats: negative log-likelihood. text_bytes: of the predicted tokens."""

    windows: int
    tokens: int
    nats: float
    text_bytes: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), held finite for a diverged model."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes


def run(config: EvaluateConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs:
    """Score the model on the validation split, let it continue the prompts, and run the benchmarks asked for.

    Writes tables/context_lengths, tables/continuations and, where asked for, tables/ablations and what
    length_extrapolation.measure, probes.measure and benchmarks.run_tasks write. Refuses, before any compute, a length
    for which the split holds no window, probes that take more different tokens than there are, a benchmark that
    cannot be read, and a peer without its package or a GPU. Leaves global random states alone.
    """
    corpus, trained = inputs["tokenize"], inputs["pretrain"]
    shards = TokenShards(corpus.path / "validation")
    trained_length = int(trained.facts["seq_len"])
    lengths = [trained_length, *(length for length in config.context_lengths if length != trained_length)]
    refuse_missing_windows(shards, [("evaluate.context_lengths", trained_length), *config.window_lengths()])
    tokenizer_json = corpus.path / "tokenizer" / "tokenizer.json"
    table = token_byte_counts(tokenizer_json, int(corpus.facts["vocab_size"]))
    usable = usable_tokens(shards, table) if config.probes.lengths else None
    if usable is not None:
        refuse_small_vocabulary(config.probes, len(usable))
    if config.tasks:
        benchmarks.check_tasks(config)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load_model(trained.path / "checkpoint", device)
    refuse_peer(checkpoint.model.config, device)
    for key, length in config.window_lengths():
        too_long = checkpoint.model.config.too_long(length)
        if too_long is not None:
            raise Refusal(f"{key}: {too_long}")
    if config.ablations:
        refuse_uniform(checkpoint.model.config)
    eos_id = checkpoint.eos_id if trained.facts.get("document_masking") else None
    max_seq_len = checkpoint.model.config.max_seq_len
    scale = byte_scale(table, shards, corpus.facts["splits"]["validation"]["bytes"])

    bytes_of_token = np.multiply(table, scale, dtype=np.float64)
    windows = {length: validation_windows(shards, length, max(1, config.max_tokens // length)) for length in lengths}
    total = sum(length * len(windows[length]) for length in [*lengths, *[trained_length] * len(config.ablations)])
    done = 0

    def score_windows(length: int) -> Score:
        nonlocal done
        score = Score(0, 0, 0.0, 0.0)
        size = max(1, config.batch_tokens // length)
        for start in range(0, len(windows[length]), size):
            if context.stop_requested:
                raise Interrupted(f"evaluation stopped after {done} of {total} tokens; it starts again next time")
            context.progress(done, total, "tokens", context_length=length)
            batch = np.stack([read_window(shards, length, w) for w in windows[length][start : start + size]])
            score = add(score, score_batch(checkpoint.model, batch, bytes_of_token, eos_id))
            done += batch[:, 1:].size
        return score

    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        scores = {length: score_windows(length) for length in lengths}
        reduced: dict[str, Score] = {}
        for ablation in config.ablations:
            with ablated(checkpoint.model, ablation):
                reduced[ablation] = score_windows(trained_length)
        continuations = continue_prompts(config, checkpoint, tokenizer_json)
        more: dict[str, float] = {}
        where = (trained_length, config.batch_tokens, device, context)
        if config.extrapolation.lengths:
            more |= length_extrapolation.measure(config.extrapolation, checkpoint.model, shards, *where)
        if usable is not None:
            more |= probes.measure(config.probes, checkpoint.model, shards, usable, *where)
    context.progress(total, total, "tokens")

    context.log_table(
        "context_lengths", [row(length, scores[length], max_seq_len) for length in config.context_lengths]
    )
    context.log_table("continuations", continuations)
    if reduced:
        rows = [{"ablation": name, **row(trained_length, score, max_seq_len)} for name, score in reduced.items()]
        context.log_table("ablations", rows)
    scored = benchmarks.run_tasks(config, checkpoint, tokenizer_json, context) if config.tasks else Outputs()
    headline = scores[trained_length]
    return Outputs(
        metrics={
            "validation_loss": headline.loss,
            "perplexity": headline.perplexity,
            "bits_per_byte": headline.bits_per_byte,
            **{f"perplexity_at/{length}": scores[length].perplexity for length in config.context_lengths},
            **{f"validation_loss/{name}": score.loss for name, score in reduced.items()},
            **{f"perplexity/{name}": score.perplexity for name, score in reduced.items()},
            **more,
            **scored.metrics,
        },
        facts={
            "max_seq_len": max_seq_len,
            "seq_len": trained_length,
            "validation_tokens_scored": headline.tokens,
            "byte_scale": scale,
            "threads": torch.get_num_threads(),
            "device": device.type,
            **scored.facts,
        },
    )


def refuse_missing_windows(shards: TokenShards, lengths: list[tuple[str, int]]) -> None:
    """Refusal naming the first (key, length) that is longer than the validation split."""
    for key, length in lengths:
        if count_windows(shards.num_tokens, length) == 0:
            raise Refusal(
                f"{key} holds {length}, but the validation split has {shards.num_tokens} tokens and one "
                f"window of {length} needs {length + 1}; drop that length, or raise tokenize.validation_fraction"
            )


@torch.no_grad()
def score_batch(
    model: Transformer,
    batch: npt.NDArray[np.int64],
    bytes_of_token: npt.NDArray[np.float64],
    eos_id: int | None = None,
) -> Score:
    """Score windows int64 [n, L + 1] in one forward pass; with eos_id, each prediction from its own document alone.

    Losses are added up in float64, so that how windows are batched changes nothing but rounding inside the model.
    """
    windows = torch.from_numpy(batch).to(model.embedding.weight.device)
    borders = None if eos_id is None else torch.from_numpy(document_borders(batch, eos_id))
    losses = next_token_loss(model, windows, "none", borders)
    text_bytes = float(bytes_of_token[batch[:, 1:]].sum())
    return Score(len(batch), losses.numel(), losses.double().sum().item(), text_bytes)


def add(one: Score, other: Score) -> Score:
    return Score(
        one.windows + other.windows,
        one.tokens + other.tokens,
        one.nats + other.nats,
        one.text_bytes + other.text_bytes,
    )


def row(length: int, score: Score, max_seq_len: int) -> dict[str, object]:
    """One row of tables/context_lengths."""
    return {
        "context_length": length,
        "extrapolation": length > max_seq_len,
        "windows": score.windows,
        "tokens": score.tokens,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


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
