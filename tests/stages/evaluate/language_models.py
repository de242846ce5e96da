"""Hand-made language models whose predictions are known, in the place of a Transformer where only scoring is at stake.

`hidden` returns the logits themselves, `logits` passes them on.
"""

import math

import torch
from torch import Tensor


class Uniform:
    """Knows nothing: every token equally likely."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, self.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


class ByPosition(Uniform):
    """Gives the token that follows by the rule t -> t + 1 (mod V) the probability share(position), from position 1."""

    def share(self, position: int) -> float:
        return 1 / (1 + position)

    def hidden(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        logits = torch.empty(batch, length, self.vocab_size)
        for position in range(1, length + 1):
            share = self.share(position)
            logits[:, position - 1] = math.log((1 - share) / (self.vocab_size - 1))
            logits[:, position - 1].scatter_(
                1, (tokens[:, position - 1 : position] + 1) % self.vocab_size, math.log(share)
            )
        return logits


class Lookup(Uniform):
    """Predicts, surely, what followed the longest earlier stretch that equals the end of the context.

    Knows nothing where there is none. `reach`: how many tokens back it sees, all of them when None.
    """

    def __init__(self, vocab_size: int, reach: int | None = None) -> None:
        super().__init__(vocab_size)
        self.reach = reach

    def hidden(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for row, ids in enumerate(tokens.tolist()):
            for position in range(len(ids)):
                found = self.follower(ids[: position + 1])
                if found is not None:
                    logits[row, position, found] = 30.0
        return logits

    def follower(self, seen: list[int]) -> int | None:
        best, found = 0, None
        earliest = 0 if self.reach is None else max(0, len(seen) - self.reach)
        for end in range(earliest, len(seen) - 1):
            length = 0
            while length <= end and seen[end - length] == seen[-1 - length]:
                length += 1
            if length > best:
                best, found = length, seen[end + 1]
        return found
