"""Continuations: greedy, or sampled at a temperature among the likeliest tokens."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lazypipe.model.transformer import Transformer

GREEDY_BELOW = 1e-6  # a temperature where logits / temperature leave float32 and all but the likeliest has no chance


def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    stop_token: int | None = None,
    top_p: float | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each row of tokens int64 [B, L], L >= 1; returns int64 [B, L + new], new <= max_new_tokens.

    The prompt is read once; every further token costs one position through the KV cache or the recurrent state. Without
    `use_cache` every token reads all before it again: the same tokens, for comparison.
    temperature 0 takes the likeliest token; above 0, the next token is drawn from softmax(logits / temperature) over
    the `top_k` likeliest (all when None), of these the fewest whose probabilities reach `top_p` together (all when
    None), with `generator`, so that the global random state is neither used nor moved. With a generator per row, a row
    does not depend on the others.
    A row that has produced `stop_token` repeats it; when all have, generation ends early.
    Raises ValueError for an empty prompt, for a temperature above 0 without a generator, and for a temperature, top_k
    or top_p outside of [0, inf), [1, inf), (0, 1].
    """
    new = steps(model, tokens, max_new_tokens, temperature, top_k, generator, stop_token, top_p, use_cache)
    return torch.cat([tokens, *new], dim=1)


def generate_all(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seeds: Sequence[int] = (),
    stop_token: int | None = None,
    top_p: float | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """New tokens of each prompt, up to and with the stop token; prompts of any lengths, at most `batch_size` at a time.

    Prompts of equal length share a batch, so that nothing is padded and no mixer has to know of padding. seeds: one per
    prompt, needed for a temperature above 0; a continuation depends on its prompt and seed, not on its neighbours.
    """
    found: list[list[int]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for length, indices in by_length.items():
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            tokens = torch.tensor([prompts[i] for i in batch], dtype=torch.int64).view(len(batch), length)
            tokens = tokens.to(model.embedding.weight.device)
            draw = [torch.Generator().manual_seed(seeds[i]) for i in batch] if seeds else None
            whole = generate(model, tokens, max_new_tokens, temperature, top_k, draw, stop_token, top_p)
            for index, row in zip(batch, whole[:, length:].tolist(), strict=True):
                found[index] = row if stop_token not in row else row[: row.index(stop_token) + 1]
    return found


@torch.no_grad()
def steps(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    stop_token: int | None = None,
    top_p: float | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """The next tokens of `generate`, int64 [B, 1] at a time, as they are chosen; raises its errors at the first."""
    if tokens.shape[1] == 0:
        raise ValueError("tokens holds no position to continue from; begin with the end-of-document token")
    if temperature > 0 and generator is None:
        raise ValueError(f"temperature={temperature} samples, which needs a torch.Generator; pass generator=")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} is not in [0, inf); 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} leaves no token to choose; it is at least 1, or None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1]; 1 keeps every token")
    if isinstance(generator, Sequence) and len(generator) != len(tokens):
        raise ValueError(f"{len(generator)} generators for {len(tokens)} rows; give one per row, or one for all")
    cache = model.new_cache(tokens.shape[1] + max_new_tokens) if use_cache else None
    stopped = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
    unread = tokens
    for _ in range(max_new_tokens):
        logits = model.logits(model.hidden(unread, cache)[:, -1:])[:, -1]
        chosen = _choose(logits, temperature, top_k, top_p, generator)
        if stop_token is not None:
            chosen = chosen.masked_fill(stopped, stop_token)
            stopped |= chosen == stop_token
        yield chosen
        if bool(stopped.all()):
            break
        unread = chosen if use_cache else torch.cat([unread, chosen], dim=1)


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    """One token [B, 1] from logits [B, V]."""
    if temperature < GREEDY_BELOW or generator is None:
        return logits.argmax(-1, keepdim=True)
    likeliest, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    probabilities = torch.softmax(likeliest / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        probabilities = nucleus(probabilities, top_p)
    # Drawn where the generator lives: a CPU generator gives a GPU model the same luck.
    if isinstance(generator, torch.Generator):
        drawn = torch.multinomial(probabilities.to(generator.device), 1, generator=generator)
    else:
        rows = zip(probabilities, generator, strict=True)
        drawn = torch.stack([torch.multinomial(row.to(own.device), 1, generator=own) for row, own in rows])
    return ids.gather(-1, drawn.to(ids.device))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, K] sorted downwards, 0 beyond the fewest that reach `top_p` together (Holtzman et al. 2020).

    Not renormalised. Sums are float64: in float32 those of 50,000 tokens are off by more than the last tokens have.
    """
    before = probabilities.double().cumsum(-1) - probabilities.double()
    return probabilities.masked_fill(before >= top_p, 0.0)
