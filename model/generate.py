"""Continuations: greedy, or sampled at a temperature among the likeliest tokens."""

import torch
from torch import Tensor

from model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """Continue each row of tokens int64 [B, L], L >= 1; returns int64 [B, L + new], new <= max_new_tokens.

    The prompt is read once; every further token costs one position through the KV cache.
    temperature 0 takes the likeliest token; above 0, the next token is drawn from softmax(logits / temperature) over
    the `top_k` likeliest (all when None), with `generator`, so that the global random state is neither used nor moved.
    A row that has produced `stop_token` repeats it; when all have, generation ends early.
    Raises ValueError for an empty prompt, and for a temperature above 0 without a generator.
    """
    if tokens.shape[1] == 0:
        raise ValueError("tokens holds no position to continue from; begin with the end-of-document token")
    if temperature > 0 and generator is None:
        raise ValueError(f"temperature={temperature} samples, which needs a torch.Generator; pass generator=")
    cache = model.new_cache(tokens.shape[1] + max_new_tokens)
    stopped = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=tokens.device)
    unread = tokens
    for _ in range(max_new_tokens):
        logits = model(unread, cache)[:, -1]
        unread = _choose(logits, temperature, top_k, generator)
        if stop_token is not None:
            unread = unread.masked_fill(stopped, stop_token)
            stopped |= unread == stop_token
        tokens = torch.cat([tokens, unread], dim=1)
        if bool(stopped.all()):
            break
    return tokens


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token [B, 1] from logits [B, V]."""
    if temperature == 0 or generator is None:
        return logits.argmax(-1, keepdim=True)
    likeliest, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    probabilities = torch.softmax(likeliest / temperature, dim=-1)
    # Drawn where the generator lives: a CPU generator gives a GPU model the same luck.
    drawn = torch.multinomial(probabilities.to(generator.device), 1, generator=generator)
    return ids.gather(-1, drawn.to(ids.device))
