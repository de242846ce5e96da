"""`lazypipe generate`: text from a trained model."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lazypipe.pipeline.commands.models import Trained, checkpoint_folder, load_trained
from lazypipe.stages.contract import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; see model.generate.generate. Sample number j of a prompt is drawn with seed + j."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    num_samples: int

    def check(self) -> None:
        """UserError for the first value out of range."""
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: ask for at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be 0 (the likeliest token) or above")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k {self.top_k}: at least 1 token must remain to choose from")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must be 0 or above")
        if self.num_samples < 1:
            raise UserError(f"--num-samples {self.num_samples}: ask for at least 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(f"--num-samples {self.num_samples}: at temperature 0 all are the same; set --temperature")


def read_prompts(arguments: Sequence[str], prompt_file: str | None, unprompted: bool) -> list[str]:
    """The prompts of the command line, then one per line of the file ('-': standard input); UserError for empty."""
    prompts = list(arguments)
    if prompt_file is not None:
        try:
            text = sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompt-file {prompt_file}: {error}; give a UTF-8 text file, one prompt per line"
            ) from None
        prompts += text.removesuffix("\n").split("\n") if text else []  # not at U+2028 or form feeds inside a line
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise UserError(f"prompt {number} is empty; give it some text, or begin a document with --unprompted")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"prompt {number} is not UTF-8 text: {prompt[:60]!r}") from None
    if unprompted:
        prompts.append("")
    if not prompts:
        raise UserError("no prompt: give one or more after the checkpoint, --prompt-file FILE (or -), or --unprompted")
    return prompts


def generate_command(
    target: Path,
    variant: str | None,
    overrides: Sequence[str],
    root: str | None,
    prompts: Sequence[str],
    sampling: Sampling,
    as_json: bool,
) -> None:
    """Print the prompts continued: one alone token by token, several when all are done, or everything as JSON."""
    sampling.check()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or pipe that is not UTF-8
    folder = checkpoint_folder(target, variant, overrides, root)
    trained = load_trained(folder)
    encoded, new_tokens = encode(trained, prompts, sampling.max_new_tokens)
    began = time.perf_counter()
    if len(prompts) == 1 and sampling.num_samples == 1 and not as_json:
        count = print_stream(trained, prompts[0], encoded[0], new_tokens, sampling, sys.stdout)
    else:
        rows = continue_all(trained, prompts, encoded, new_tokens, sampling)
        count = sum(len(row["tokens"]) for row in rows)
        if as_json:
            seconds = time.perf_counter() - began
            settings = {"checkpoint": str(folder), **vars(sampling), "max_new_tokens": new_tokens}
            print(json.dumps({**settings, "seconds": seconds, "continuations": rows}, indent=1, ensure_ascii=False))
        else:
            print_texts(rows, sys.stdout)
    seconds = time.perf_counter() - began
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s", file=sys.stderr)


def encode(trained: Trained, prompts: Sequence[str], max_new_tokens: int) -> tuple[list[list[int]], int]:
    """Token ids of the prompts, and how many tokens can follow all of them; UserError for a prompt that leaves no room.

    An empty prompt begins a document, with the end-of-document token.
    """
    config = trained.checkpoint.model.config
    tokenizer: Any = trained.tokenizer
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids or [trained.checkpoint.eos_id] for text in prompts]
    for number, ids in enumerate(encoded, start=1):
        outside = max(ids)
        if outside >= trained.checkpoint.vocab_size:
            raise UserError(
                f"prompt {number} holds token {outside}, but the model has {trained.checkpoint.vocab_size}: "
                f"{trained.checkpoint.tokenizer_path} is not the tokenizer it was trained with"
            )
        too_long = config.too_long(len(ids) + 1)
        if too_long is not None:
            raise UserError(f"prompt {number} and one new token: {too_long}")
    longest = max(map(len, encoded))
    if config.too_long(longest + max_new_tokens) is not None:
        max_new_tokens = config.max_seq_len - longest
        print(f"note: only {max_new_tokens} new tokens fit max_seq_len={config.max_seq_len}", file=sys.stderr)
    elif longest + max_new_tokens > config.max_seq_len:
        print(f"note: going beyond max_seq_len={config.max_seq_len}, what the model is meant for", file=sys.stderr)
    return encoded, max_new_tokens


def print_stream(
    trained: Trained, prompt: str, ids: Sequence[int], new_tokens: int, sampling: Sampling, stream: TextIO
) -> int:
    """Print the prompt and each token's text as soon as it is whole characters; returns the number of new tokens."""
    import torch

    from lazypipe.model.generate import steps

    model, eos = trained.checkpoint.model, trained.checkpoint.eos_id
    tokens = torch.tensor([ids], device=model.embedding.weight.device)
    draw = torch.Generator().manual_seed(sampling.seed)
    text = GrowingText(trained.tokenizer, ids)
    stream.write(f"\033[1m{prompt}\033[0m" if stream.isatty() else prompt)
    count = 0
    for one in steps(model, tokens, new_tokens, sampling.temperature, sampling.top_k, draw, eos, sampling.top_p):
        count += 1
        if int(one) != eos:  # not every tokenizer marks it as special, to be left out of the text
            stream.write(text.add(int(one)))
        stream.flush()
    stream.write(text.rest() + "\n")
    stream.flush()
    return count


class GrowingText:
    """The text of a growing list of tokens, in pieces that join to the text of the whole.

    A character may be spread over several tokens, and a lone part of it decodes to U+FFFD: text that ends in one waits
    until more tokens have come. Only the tokens since the last piece and one piece before it are decoded again, which
    is enough for tokenizers whose tokens depend on their left neighbour (a SentencePiece space).
    """

    def __init__(self, tokenizer: object, ids: Sequence[int]) -> None:
        self._decode: Any = tokenizer.decode  # type: ignore[attr-defined]
        self._ids = list(ids)
        self._before, self._written = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often that of the token, sometimes nothing."""
        self._ids.append(token)
        piece = self._new()
        if piece.endswith("\ufffd"):
            return ""
        self._before, self._written = self._written, len(self._ids)
        return piece

    def rest(self) -> str:
        """What was held back, as it stands."""
        return self._new()

    def _new(self) -> str:
        known = self._decode(self._ids[self._before : self._written])
        whole = self._decode(self._ids[self._before :])
        return str(whole[len(known) :])


def continue_all(
    trained: Trained, prompts: Sequence[str], encoded: Sequence[list[int]], new_tokens: int, sampling: Sampling
) -> list[dict[str, Any]]:
    """A row per prompt and sample: {prompt, sample, text, tokens (ids), ended: by the end-of-document token}."""
    from lazypipe.model.generate import generate_all

    checkpoint, tokenizer = trained.checkpoint, trained.tokenizer
    jobs = [(number, sample) for number in range(len(prompts)) for sample in range(sampling.num_samples)]
    found = generate_all(
        checkpoint.model,
        [encoded[number] for number, _ in jobs],
        new_tokens,
        sampling.temperature,
        sampling.top_k,
        [sampling.seed + sample for _, sample in jobs],
        checkpoint.eos_id,
        sampling.top_p,
    )
    rows = []
    for (number, sample), new in zip(jobs, found, strict=True):
        text = GrowingText(tokenizer, encoded[number])
        ended = bool(new) and new[-1] == checkpoint.eos_id
        whole = "".join([*(text.add(token) for token in (new[:-1] if ended else new)), text.rest()])
        rows.append({"prompt": prompts[number], "sample": sample, "text": whole, "tokens": new, "ended": ended})
    return rows


def print_texts(rows: Sequence[dict[str, Any]], stream: TextIO) -> None:
    """Each continuation below a line with its number; prompts in bold where the terminal can."""
    samples = 1 + max(row["sample"] for row in rows)
    number = 0
    for row in rows:
        number += row["sample"] == 0
        head = f"prompt {number}" + (f", sample {row['sample'] + 1}" if samples > 1 else "")
        prompt = f"\033[1m{row['prompt']}\033[0m" if stream.isatty() else row["prompt"]
        stream.write(f"--- {head}\n{prompt}{row['text']}\n")
