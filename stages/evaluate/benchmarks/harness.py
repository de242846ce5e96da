"""A model of ours behind the interface of lm-evaluation-harness: log-likelihoods of texts, and continuations.

What decides a number: a context and its continuation are encoded together and cut apart, as the harness does for causal
models; what is longer than `max_length` loses its first tokens; log-probabilities are float32 and added up in float64.
How requests are batched decides nothing: inputs are padded on the right, which a causal model cannot see.

What makes it fast: requests of equal input (the choices "no" and "yes" of one question) go through the model once,
batches hold inputs of similar length, and logits exist only where a token is scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from torch import Tensor

from lazypipe.model.generate import generate_all
from lazypipe.model.scoring import LOGITS_AT_ONCE
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import UserError

MAX_NEW_TOKENS = 256  # of a task that names no number, as the harness's own backends
KNOWN_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # of generation_kwargs

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """What a task cost. truncated: requests that lost their first tokens, `tokens_cut` of them altogether."""

    requests: int = 0
    forward_rows: int = 0
    truncated: int = 0
    tokens_cut: int = 0


@dataclass(frozen=True)
class _Scored:
    """One request: which tokens to score after which input, both as the model sees them."""

    index: int
    inputs: Tokens
    targets: Tokens


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is untyped
    """`model` and its tokenizer for the harness.

    max_length: tokens the model is given at once. bos: begin every prompt with `eos_id`, which begins every document.
    batch_tokens: tokens of a padded batch; batch_size, if given, counts requests instead.
    on_batch: called with the number of requests done and of all there are of their kind; may raise to stop.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer_json: Path,
        eos_id: int,
        *,
        max_length: int | None = None,
        bos: bool = False,
        batch_tokens: int = 8192,
        batch_size: int | None = None,
        dtype: str = "float32",
        seed: int = 0,
        on_batch: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = Tokenizer.from_file(str(tokenizer_json))
        self.max_length = max_length or model.config.max_seq_len
        self.counts = Counts()
        self._device = model.embedding.weight.device
        self._eos_id = eos_id
        self._bos = bos
        self._batch_tokens = batch_tokens
        self._batch_size = batch_size
        self._bfloat16 = dtype == "bfloat16"
        self._seed = seed
        self._on_batch = on_batch
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        return self._eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; with `bos`, and unless special tokens are refused, begun by eos_id."""
        ids = self._encoded.get(string)
        if ids is None:
            ids = self.tokenizer.encode(string, add_special_tokens=False).ids
        if self._bos and add_special_tokens is not False and ids[:1] != [self._eos_id]:
            return [self._eos_id, *ids]
        return list(ids)

    # ---- log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: ARG002
        """[(log p(continuation | context) in nats, whether it is what greedy decoding would say)] by request."""
        # All texts at once: the tokenizer uses every core, and a context is encoded once for all of its continuations.
        texts = {context.rstrip() for context, _ in (request.args for request in requests)}
        texts |= {context + continuation for context, continuation in (request.args for request in requests)}
        self._remember(texts)
        try:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded.clear()
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """log p(text) in nats by request, in windows of max_length that share no prediction; eos_id comes first."""
        self._remember({request.args[0] for request in requests})
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self._eos_id, self.max_length, context_len=1):
                windows.append((number, *make_disjoint_window(window)))
        self._encoded.clear()
        scores = self._loglikelihood_tokens([(("", ""), context, target) for _, context, target in windows])
        totals = [0.0] * len(requests)
        for (number, _, _), (score, _) in zip(windows, scores, strict=True):
            totals[number] += score
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        # A tokenizer may join the end of a context and a whole continuation to one token: the harness's own backends
        # stop with an assertion, here the continuation is encoded alone.
        wanted: list[_Scored] = []
        for index, ((_context, text), context, targets) in enumerate(requests):
            after = targets or self.tok_encode(text, add_special_tokens=False)
            wanted += self._fit(index, context or [self._eos_id], after)
        sums = torch.zeros(len(requests), dtype=torch.float64)
        missed = torch.zeros(len(requests), dtype=torch.int64)
        done = 0
        for batch in self._batches(wanted):
            self._score(batch, sums, missed)
            done += sum(len(same) for same in batch)
            self._on_batch(done, len(wanted))
        return [(total, miss == 0) for total, miss in zip(sums.tolist(), missed.tolist(), strict=True)]

    def _fit(self, index: int, context: list[int], targets: list[int]) -> list[_Scored]:
        """A request's input and targets, cut from the left to `max_length` inputs; the last target is no input.

        A continuation of more than `max_length` tokens, at which the harness's own backends stop with an assertion, is
        scored in pieces of that length.
        """
        whole = context + targets
        pieces = []
        for start in range(0, len(targets), self.max_length):
            piece = targets[start : start + self.max_length]
            end = len(context) + start + len(piece) - 1
            pieces.append(_Scored(index, tuple(whole[max(0, end - self.max_length) : end]), tuple(piece)))
        cut = max(0, len(whole) - 1 - self.max_length)
        self._count(requests=1, truncated=int(cut > 0), tokens_cut=min(cut, len(context) - 1))
        return pieces

    def _batches(self, wanted: Sequence[_Scored]) -> Iterator[list[list[_Scored]]]:
        """Groups of requests with equal input, longest first, as many as fit a padded batch."""
        groups: dict[Tokens, list[_Scored]] = {}
        for request in wanted:
            groups.setdefault(request.inputs, []).append(request)
        ordered = [groups[key] for key in sorted(groups, key=lambda inputs: (-len(inputs), inputs))]
        start = 0
        while start < len(ordered):
            width = len(ordered[start][0].inputs)
            size = self._batch_size or max(1, self._batch_tokens // width)
            yield ordered[start : start + size]
            start += size

    @torch.no_grad()
    def _score(self, batch: Sequence[Sequence[_Scored]], sums: Tensor, missed: Tensor) -> None:
        """Add each request's log-probability to `sums`, the number of its targets that are no argmax to `missed`."""
        self._count(forward_rows=len(batch))
        width = len(batch[0][0].inputs)
        tokens = torch.full((len(batch), width), self._eos_id, dtype=torch.int64)
        positions: list[int] = []  # of scored inputs in the flattened batch, each once
        # Of every target: its number in `positions`, its token, its request.
        place, target, owner = list[int](), list[int](), list[int]()
        for row, same in enumerate(batch):
            inputs = same[0].inputs
            tokens[row, : len(inputs)] = torch.tensor(inputs)
            longest = max(len(request.targets) for request in same)
            end = len(positions) + longest
            positions += range(row * width + len(inputs) - longest, row * width + len(inputs))
            for request in same:
                place += range(end - len(request.targets), end)
                target += request.targets
                owner += [request.index] * len(request.targets)
        device = self._device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16):
            hidden = self.model.hidden(tokens.to(device)).flatten(0, 1)[torch.tensor(positions, device=device)]
        places = torch.tensor(place, device=device)
        targets = torch.tensor(target, device=device)
        log_probs = torch.empty(len(place), device=device)
        greedy = torch.empty(len(place), dtype=torch.bool, device=device)
        rows_at_once = max(1, LOGITS_AT_ONCE // self.model.vocab_size)
        for start in range(0, len(positions), rows_at_once):
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16):
                logits = self.model.logits(hidden[start : start + rows_at_once])
            here = ((places >= start) & (places < start + rows_at_once)).nonzero()[:, 0]
            rows, chosen = places[here] - start, targets[here]
            log_probs[here] = logits[rows, chosen] - torch.logsumexp(logits, dim=-1)[rows]
            greedy[here] = logits.argmax(dim=-1)[rows] == chosen
        owners = torch.tensor(owner)
        sums.index_add_(0, owners, log_probs.cpu().double())
        missed.index_add_(0, owners, (~greedy).cpu().long())

    # ---- continuations

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Continuations, each cut before the first of its stop texts. Greedy unless the task asks for sampling.

        Request i is sampled with seed + i by a generator of its own, whatever the batches.
        """
        prompts = [tuple(self.tok_encode(request.args[0])) or (self._eos_id,) for request in requests]
        settings = [repr(sorted(request.args[1].items())) for request in requests]
        # `generate_all` batches prompts of equal length: they stand side by side.
        order = sorted(range(len(requests)), key=lambda i: (settings[i], -len(prompts[i]), i))
        size = self._batch_size or max(1, self._batch_tokens // self.max_length)
        answers = [""] * len(requests)
        done = 0
        for _, equal in itertools.groupby(order, key=lambda i: settings[i]):
            same = list(equal)
            for start in range(0, len(same), size):
                batch = same[start : start + size]
                seeds = [self._seed + i for i in batch]
                texts = self._continue([prompts[i] for i in batch], seeds, requests[batch[0]].args[1])
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
                done += len(batch)
                self._on_batch(done, len(requests))
        return answers

    def _continue(self, prompts: Sequence[Tokens], seeds: Sequence[int], settings: dict[str, Any]) -> list[str]:
        kwargs = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        beams = kwargs.pop("num_beams", 1)
        unknown = ["num_beams"] if beams != 1 else sorted(kwargs.keys() - KNOWN_SETTINGS)
        if unknown:
            raise UserError(
                f"generation_kwargs of the task hold {unknown[0]}={settings[unknown[0]]!r}, which would be ignored; "
                f"known are {', '.join(sorted(KNOWN_SETTINGS))}; leave the task out"
            )
        eos_text = self.tokenizer.decode([self._eos_id], skip_special_tokens=False)
        stops = handle_stop_sequences(kwargs.get("until"), eos=eos_text)
        new_tokens = int(kwargs["max_gen_toks"])
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(
                f"evaluate.max_length={self.max_length} leaves no room for a prompt before the {new_tokens} tokens the "
                "task generates; raise max_length (and the model's max_seq_len), or leave the task out"
            )
        cuts = [max(0, len(prompt) - room) for prompt in prompts]
        self._count(requests=len(prompts), truncated=sum(cut > 0 for cut in cuts), tokens_cut=sum(cuts))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            continuations = generate_all(
                self.model,
                [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)],
                new_tokens,
                float(kwargs.get("temperature") or 0.0),
                kwargs.get("top_k"),
                seeds,
                self._eos_id,
                kwargs.get("top_p"),
                batch_size=len(prompts),
            )
        texts = []
        for ids in continuations:
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            for stop in stops:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts

    # ---- what the methods above share

    def _remember(self, texts: set[str]) -> None:
        ordered = sorted(texts)
        encoded = self.tokenizer.encode_batch(ordered, add_special_tokens=False)
        self._encoded = {text: found.ids for text, found in zip(ordered, encoded, strict=True)}

    def _count(self, **more: int) -> None:
        now = self.counts
        self.counts = Counts(**{name: getattr(now, name) + more.get(name, 0) for name in now.__dataclass_fields__})
