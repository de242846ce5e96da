"""Packed documents: one row of tokens that holds several documents, none of which sees another.

What works position by position (embeddings, projections, norms, MLPs, the output matrix) goes over the whole row.
Attention takes the documents apart: those of one length form a batch, so windows without a border inside are as many
rows as ever, and no matrix is larger than a document squared.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed row lie. Made by `packed`.

    cu_seqlens  int32 [N + 1] on the device of the tokens: first positions, and the end of the last document
    lengths     the N lengths
    positions   int64 [L]: each token's position in its own document
    """

    cu_seqlens: Tensor
    lengths: list[int]
    positions: Tensor
    _by_length: dict[int, list[int]] = field(default_factory=dict, repr=False)

    @staticmethod
    def packed(cu_seqlens: Tensor, tokens: Tensor) -> "Documents":
        """The documents of tokens [1, L]. cu_seqlens is best on the CPU: from a GPU it is read back in every pass.

        Raises ValueError, saying what was found, unless cu_seqlens is int32 [N + 1] and rises from 0 to L.
        """
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; expected int32 [documents + 1]"
            )
        if tokens.shape[0] != 1:
            raise ValueError(f"tokens has shape {list(tokens.shape)}; expected one row of documents beside cu_seqlens")
        ends = cu_seqlens.tolist()
        lengths = [after - before for before, after in itertools.pairwise(ends)]
        if ends[0] != 0 or ends[-1] != tokens.shape[1] or min(lengths) < 1:
            raise ValueError(
                f"cu_seqlens is {_shown(ends)}; expected numbers that rise from 0 to {tokens.shape[1]}, the tokens of "
                "the row, with at least one token to a document"
            )
        device = tokens.device
        cu_seqlens = cu_seqlens.to(device)
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=ends[-1])
        by_length: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            by_length.setdefault(length, []).append(number)
        return Documents(cu_seqlens, lengths, torch.arange(ends[-1], device=device) - starts, by_length)

    # Every packed row has other lengths, and each would be compiled anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def each(self, function: Callable[..., Tensor], *packed: Tensor) -> Tensor:
        """`function` of every document by itself, joined again: [1, H, L, ...] of tensors [1, H, L, ...].

        It is called once for every length there is, on the n documents of that length as a batch [n, H, length, ...].
        """
        pieces = [torch.split(tensor, self.lengths, dim=2) for tensor in packed]
        results: dict[int, Tensor] = {}
        for numbers in self._by_length.values():
            out = function(*(torch.cat([piece[number] for number in numbers]) for piece in pieces))
            results.update(zip(numbers, out.unsqueeze(1), strict=True))
        return torch.cat([results[number] for number in range(len(self.lengths))], dim=2)

    def within(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(first, last + 1, first position of the document) of each document's share of positions start ... end - 1."""
        begin = 0
        for length in self.lengths:
            first, last = max(start, begin), min(end, begin + length)
            if first < last:
                yield first, last, begin
            begin += length


def weight_rows(
    weights_of: Callable[[int, int, int], Tensor], length: int, query_block: int, documents: Documents | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (query_start, weights [B, H, rows, length]) of `length` positions, `query_block` rows at a time.

    weights_of(a, b, c): [B, H, b - a, b - c] of queries a ... b - 1 and keys c ... b - 1, c being where their document
    begins. All other weights are 0.
    """
    for start in range(0, length, query_block):
        end = min(start + query_block, length)
        shares = [(start, end, 0)] if documents is None else documents.within(start, end)
        rows = [F.pad(weights_of(a, b, c), (c, length - b)) for a, b, c in shares]
        yield start, rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)


def first_keys(length: int, documents: Documents | None, device: torch.device) -> Tensor:
    """Where the document of each query of a row begins, int64 [length]: 0 everywhere without documents."""
    at = torch.arange(length, device=device)
    return torch.zeros_like(at) if documents is None else at - documents.positions


def first_key_mass(rows: Iterator[tuple[int, Tensor]], documents: Documents | None) -> Tensor:
    """mean_i A_i1, the mean weight on the first key that a query sees, [H] float32, of rows as `weight_rows` yields.

    Raises ValueError when there are no rows.
    """
    total, queries = None, 0
    for start, weights in rows:
        count, length = weights.shape[2:]
        first = first_keys(length, documents, weights.device)[start : start + count]
        mass = weights.float().gather(-1, first[:, None].expand(*weights.shape[:3], 1))[..., 0].mean(0).sum(-1)
        total = mass if total is None else total + mass
        queries += count
    if total is None:
        raise ValueError("the attention has no rows to look for a sink in; give it at least one token")
    return total / queries


def visible_keys(length: int, documents: Documents | None, device: torch.device) -> Tensor:
    """n_i, the number of keys each query of a row may see, int64 [length]."""
    before = torch.arange(length, device=device) if documents is None else documents.positions
    return before + 1


def _shown(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"{str(numbers[:6])[:-1]}, ... {str(numbers[-3:])[1:]}"
