"""How far every tile that ships is from the float64 reference: `python -m lazypipe.kernels.gpu.tile_errors`.

Runs the kernels themselves: on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter, which indexes as a GPU does
but multiplies float32 without TF32. A row is a set of tiles, one for each kernel, and there are sets until each tile is
in one. In the interpreter warps and stages change nothing, so tiles of equal blocks count as one there.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lazypipe.kernels.gpu.tiles import KERNELS, Tile, default_tile, fits, forced_tiles, padded_dim, shipped_tiles
from lazypipe.kernels.gpu.tuning import does_not_fit
from lazypipe.kernels.oracle import (
    BOUNDS,
    INFERENCE,
    TRAINING,
    Problem,
    draw_problem,
    inference_errors,
    largest,
    training_errors,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = tuple(dict.fromkeys((*TRAINING, *INFERENCE)))
NARROW_WINDOW = 1  # of the bias: some blocks lie wholly beyond it, though a problem is only two or three blocks long
AFTER_BLOCKS = 5  # tokens of the last block, and keys before the first query: no divisor of a block


class Case(NamedTuple):
    """A set of tiles to run; `source` says where it comes from: a default, or tuning's candidates."""

    head_dim: int
    dtype: torch.dtype
    source: str
    tiles: dict[str, Tile]


def cases_for(
    head_dim: int, dtype: torch.dtype, archs: Sequence[int] = (80, 90), *, every_tile: bool = True,
    by_blocks: bool = True,
) -> list[Case]:  # fmt: skip
    """The default set of each architecture and, with `every_tile`, sets that hold every other tile that ships.

    `by_blocks`: tiles that differ in warps and stages only are one.
    """
    wide, padded = dtype == torch.float32, padded_dim(head_dim)
    shipped: dict[str, list[Tile]] = {}
    for kernel in KERNELS:
        tiles = [tile for arch in archs for tile in shipped_tiles(kernel, padded, wide, arch // 10)]
        shipped[kernel] = list({_key(tile, by_blocks): tile for tile in reversed(tiles)}.values())[::-1]
    missing = {(kernel, _key(tile, by_blocks)) for kernel in KERNELS for tile in shipped[kernel]}
    cases: dict[tuple[Any, ...], Case] = {}

    def add(source: str, tiles: dict[str, Tile]) -> None:
        keys = {(kernel, _key(tile, by_blocks)) for kernel, tile in tiles.items()}
        missing.difference_update(keys)
        cases.setdefault(tuple(sorted(keys)), Case(head_dim, dtype, source, tiles))

    for arch in archs:
        add(f"sm_{arch}", {kernel: default_tile(kernel, padded, wide, arch // 10) for kernel in KERNELS})
    while every_tile and missing:
        # The forward that most of the missing tiles, itself included, can stand beside.
        sets = [_beside(forward, shipped, missing, by_blocks) for forward in shipped["forward"]]
        add("tuning", max(sets, key=lambda tiles: sum((k, _key(t, by_blocks)) in missing for k, t in tiles.items())))
    return list(cases.values())


def _key(tile: Tile, by_blocks: bool) -> tuple[int, ...]:
    return tuple(tile[:2] if by_blocks else tile)


def _beside(
    forward: Tile, shipped: dict[str, list[Tile]], missing: set[tuple[str, tuple[int, ...]]], by_blocks: bool
) -> dict[str, Tile]:
    """The forward tile, and for each other kernel a tile that reads its mask, a missing one if there is one."""
    chosen = {"forward": forward}
    for kernel in KERNELS[1:]:
        fitting = [tile for tile in shipped[kernel] if fits(kernel, tile, forward)]
        chosen[kernel] = next((tile for tile in fitting if (kernel, _key(tile, by_blocks)) in missing), fitting[0])
    return chosen


def problems_for(case: Case, device: torch.device) -> tuple[Problem, Problem]:
    """Two problems of two heads that share one key head.

    Two or more blocks of every tile, the last incomplete. One has more keys than queries and a bias that reaches over
    two thirds of them; the other packed documents, one of a single token, and for every tile a block beyond its bias.
    """
    length = problem_length(case)
    keys = length + AFTER_BLOCKS
    return (
        draw_problem(2, 1, case.head_dim, 2 * keys // 3, case.dtype, device, length, keys),
        draw_problem(2, 1, case.head_dim, NARROW_WINDOW, case.dtype, device, length, documents=[0, 1, 12]),
    )


def errors_of(case: Case, problems: Sequence[Problem]) -> dict[str, float]:
    """Largest error of each of COLUMNS over the problems."""
    with forced_tiles(case.tiles):
        return largest(*(compare(p, "triton") for p in problems for compare in (training_errors, inference_errors)))


def problem_length(case: Case) -> int:
    """Queries of the problems: few, since the interpreter is slow, with a last row of blocks beyond NARROW_WINDOW."""

    def full_blocks(tile: Tile) -> int:
        beyond = NARROW_WINDOW + tile.block_n - 1  # a block this far from the diagonal meets no bias
        return max(tile.block_n, -(-beyond // tile.block_m) * tile.block_m)

    return max(map(full_blocks, case.tiles.values())) + AFTER_BLOCKS


def format_row(case: Case, errors: dict[str, float] | None) -> str:
    """One line of the table; None for tiles that need more memory than the GPU has."""
    name = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    line = f"{case.head_dim:>4} {name:6}{case.source:8}"
    line += "".join(f"{'x'.join(map(str, case.tiles[kernel])):>14}" for kernel in KERNELS)
    if errors is None:
        return line + "  does not fit this GPU"
    return line + "".join(f"{errors[column]:>10.1e}" for column in COLUMNS) + f"{BOUNDS[case.dtype]:>10.0e}"


def measured(cases: Sequence[Case], device: torch.device) -> Iterator[tuple[Case, dict[str, float] | None]]:
    """The errors of each case as they come; None for tiles that need more memory than the GPU has."""
    for case in cases:
        try:
            yield case, errors_of(case, problems_for(case, device))
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            if not does_not_fit(error):
                raise
            yield case, None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and the worst row of each dtype; returns 1 when an error is above its dtype's bound, else 0."""
    parser = argparse.ArgumentParser(prog="python -m lazypipe.kernels.gpu.tile_errors", description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 64, 96, 128, 192, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--arch", type=int, nargs="+", choices=[80, 90], help="default: the GPU's; both without one")
    parser.add_argument("--defaults", action="store_true", help="only the default tiles")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args(argv)
    # log2(0) is meant (tau >= 0), and masked lanes may overflow before they are dropped; numpy warns of both.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    device, archs = torch.device("cpu"), [80, 90]
    if torch.cuda.is_available():
        device = torch.device("cuda")
        archs = [80 if torch.cuda.get_device_capability()[0] < 9 else 90]
    cases = [
        case
        for dim in arguments.dims
        for dtype in arguments.dtypes
        for case in cases_for(
            dim, DTYPES[dtype], arguments.arch or archs, every_tile=not arguments.defaults,
            by_blocks=device.type == "cpu",
        )
    ]  # fmt: skip
    head = f"{'D':>4} {'dtype':6}{'source':8}" + "".join(f"{kernel:>14}" for kernel in KERNELS)
    print(head + "".join(f"{column:>10}" for column in COLUMNS) + f"{'bound':>10}")
    worst: dict[torch.dtype, tuple[float, str]] = {}
    rows = []
    for case, errors in measured(cases, device):
        line = format_row(case, errors)
        print(line, flush=True)
        rows.append({**case._asdict(), "dtype": str(case.dtype), "errors": errors})
        if errors is not None:
            worst[case.dtype] = max(worst.get(case.dtype, (0.0, "")), (max(errors.values()), line))
    for error, line in worst.values():
        print(f"worst, {error:.1e}: {line.strip()}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(error <= BOUNDS[dtype] for dtype, (error, _) in worst.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
