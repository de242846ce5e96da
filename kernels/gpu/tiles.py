"""Which tile each Triton kernel uses: a table of defaults, a cache of measured choices, and what fits together.

A tile is looked up by (kernel, padded head_dim, 16 or 32 bit). The cache is a JSON file written by tuning.py
and read once per process, so a choice never changes while a model trains. By `python -m lazypipe.kernels.gpu.audit` the
defaults compile without spills for sm_80 and sm_90, but for the float32 forward of head_dim 256 (about 100 bytes of
stack per thread); no GPU has timed them.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

KERNELS = ("forward", "query", "key", "bias")


class Tile(NamedTuple):
    """Query rows and keys per block, and how the compiler may spread and pipeline it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Candidates by (kernel, padded head_dim, wide = float32); the first is the default.
CANDIDATES: dict[tuple[str, int, bool], tuple[Tile, ...]] = {}
for _dim in (16, 32, 64):
    CANDIDATES["forward", _dim, False] = (Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3))
    CANDIDATES["query", _dim, False] = (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3))
    CANDIDATES["key", _dim, False] = (Tile(64, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2))
    CANDIDATES["bias", _dim, False] = (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2))
CANDIDATES["forward", 128, False] = (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2))
CANDIDATES["query", 128, False] = (Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2))
CANDIDATES["key", 128, False] = (Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 128, 8, 2))
CANDIDATES["bias", 128, False] = (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2))
CANDIDATES["forward", 256, False] = (Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 32, 8, 2))
CANDIDATES["query", 256, False] = (Tile(32, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 2), Tile(32, 32, 8, 1))
CANDIDATES["key", 256, False] = (Tile(16, 64, 8, 1), Tile(32, 64, 8, 1))
CANDIDATES["bias", 256, False] = (Tile(64, 64, 8, 1), Tile(64, 64, 4, 1))
for _dim in (16, 32, 64):
    CANDIDATES["forward", _dim, True] = (Tile(64, 32, 4, 2), Tile(64, 32, 8, 2))
    CANDIDATES["query", _dim, True] = (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2))
    # With keys, values and both gradients in registers as TF32 triples, 32 x 32 spilled from head_dim 32.
    CANDIDATES["key", _dim, True] = (Tile(16, 32, 4, 1), Tile(32, 32, 4, 2), Tile(32, 64, 8, 2))
    CANDIDATES["bias", _dim, True] = (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2))
CANDIDATES["bias", 64, True] = (Tile(16, 16, 4, 1), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2))
CANDIDATES["forward", 128, True] = (Tile(16, 32, 4, 1), Tile(64, 32, 8, 2))
CANDIDATES["query", 128, True] = (Tile(16, 32, 8, 1), Tile(32, 32, 8, 1))
CANDIDATES["key", 128, True] = (Tile(16, 32, 8, 1), Tile(32, 32, 8, 1))
CANDIDATES["bias", 128, True] = (Tile(16, 16, 8, 1), Tile(32, 32, 4, 1))
CANDIDATES["forward", 256, True] = (Tile(16, 32, 8, 1), Tile(32, 32, 8, 1))
CANDIDATES["query", 256, True] = (Tile(16, 32, 8, 1), Tile(32, 32, 8, 1))
CANDIDATES["key", 256, True] = (Tile(16, 16, 8, 1), Tile(16, 32, 8, 1))
CANDIDATES["bias", 256, True] = (Tile(16, 16, 8, 1), Tile(32, 32, 8, 1))

# Defaults where mma, with its operands in registers, needs smaller tiles than wgmma.
AMPERE: dict[tuple[str, int, bool], Tile] = {
    ("forward", 128, False): Tile(64, 64, 8, 2),
    ("forward", 256, False): Tile(64, 32, 8, 2),
    ("query", 256, False): Tile(32, 32, 8, 1),
    ("key", 128, False): Tile(16, 64, 8, 1),
    ("key", 256, False): Tile(16, 32, 4, 1),
    ("bias", 128, False): Tile(64, 64, 8, 2),
    ("bias", 256, False): Tile(64, 64, 8, 1),
    ("forward", 16, True): Tile(32, 32, 4, 2),
    ("query", 16, True): Tile(32, 32, 4, 2),
    ("key", 128, True): Tile(16, 16, 8, 1),
    ("forward", 64, True): Tile(32, 32, 4, 2),
    ("query", 64, True): Tile(32, 32, 4, 1),
}
for _dim in (16, 32, 64):
    AMPERE["query", _dim, False] = Tile(128, 64, 8, 1)
    AMPERE["key", _dim, False] = Tile(32, 64, 8, 2)

# float32 kernels, by padded head_dim, whose TF32 triples spilled in every tile tried, down to 16 x 16.
IEEE = {("bias", 128), ("dk", 128), ("query", 256), ("bias", 256), ("dk", 256), ("dv", 256)}

# Rows of a decode tile are the queries of a group, at most DECODE_ROWS; longer chunks go through the forward kernel.
DECODE_ROWS = 64

_forced: dict[str, Tile] = {}


def padded_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a kernel pads head_dim to (96 becomes 128)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def fits(kernel: str, tile: Tile, forward: Tile) -> bool:
    """Whether a backward tile can read the block mask that a forward tile wrote."""
    rows_fit = forward.block_m % tile.block_m == 0
    if kernel == "query":
        return rows_fit and tile.block_n == forward.block_n
    aligned = tile.block_n % forward.block_n == 0 or forward.block_n % tile.block_n == 0
    return rows_fit and aligned and (kernel != "bias" or tile.block_m == tile.block_n)


def default_tile(kernel: str, padded: int, wide: bool, capability: int) -> Tile:
    """The default for a GPU of this major compute capability: 8 (mma) or 9 and later (wgmma)."""
    hopper = CANDIDATES[kernel, padded, wide][0]
    return AMPERE.get((kernel, padded, wide), hopper) if capability < 9 else hopper


def shipped_tiles(kernel: str, padded: int, wide: bool, capability: int) -> list[Tile]:
    """Every tile a GPU of this capability may be given, its default first: what tuning times and the audit compiles."""
    return list(dict.fromkeys([default_tile(kernel, padded, wide, capability), *CANDIDATES[kernel, padded, wide]]))


def decode_tile(padded: int, wide: bool) -> Tile:
    """Rows are the queries of a group, padded to 16 or more; 64 keys a step, fewer where 64 spilled."""
    return Tile(16, 32 if padded * (2 if wide else 1) > 128 else 64, 4, 3)


def product_precision(kernel: str, padded: int, wide: bool) -> str:
    """Triton's input_precision for the products of a kernel, with "dk" and "dv" for the two halves of "key".

    float32 never falls back to plain TF32. Three TF32 products restore its accuracy on tensor cores; each operand then
    sits in registers in two parts, and where that spilled, products are IEEE multiply-adds.
    """
    return "ieee" if not wide or (kernel, padded) in IEEE else "tf32x3"


def separate_outputs(padded: int, wide: bool) -> bool:
    """Whether dk and dv come from two launches: together their accumulators spill at head_dim 256 and in float32.

    The second launch repeats one product of the seven; the spills were up to 12 KB of stack per thread.
    """
    return padded > 128 or (wide and padded > 32)


def keep_values(padded: int, wide: bool) -> bool:
    """Whether the key kernel holds its V tile in registers; in float32 beside K it spilled, even at 16 x 16."""
    return not (wide and padded > 64)


def tile_for(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile a kernel uses for this head_dim and dtype on this device: forced, else measured, else the default."""
    if kernel in _forced:
        return _forced[kernel]
    wide = dtype == torch.float32
    if device.type == "cuda":
        measured = _read_cache().get(cache_key(kernel, head_dim, wide, torch.cuda.get_device_name(device)))
        if measured is not None:
            return Tile(*measured)
        return default_tile(kernel, padded_dim(head_dim), wide, torch.cuda.get_device_capability(device)[0])
    return default_tile(kernel, padded_dim(head_dim), wide, 9)


@contextlib.contextmanager
def forced_tiles(tiles: dict[str, Tile]) -> Iterator[None]:
    """Inside the block the named kernels use these tiles. Raises ValueError when they do not fit together."""
    together = {**_forced, **tiles}
    for kernel, tile in together.items():
        if kernel != "forward" and "forward" in together and not fits(kernel, tile, together["forward"]):
            raise ValueError(f"{kernel} tile {tuple(tile)} cannot read the mask of forward tile {together['forward']}")
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def cache_path() -> Path:
    """Where measured tiles are kept: LAZYPIPE_TILE_CACHE, else ~/.cache/lazypipe/tiles.json."""
    return Path(os.environ.get("LAZYPIPE_TILE_CACHE", Path.home() / ".cache" / "lazypipe" / "tiles.json"))


def cache_key(kernel: str, head_dim: int, wide: bool, device_name: str) -> str:
    """What a measured choice holds for: kernel, padded head_dim, width, GPU and Triton version."""
    import triton

    return f"{kernel} d{padded_dim(head_dim)} {32 if wide else 16}-bit {device_name} triton {triton.__version__}"


@functools.cache
def _read_cache() -> dict[str, list[int]]:
    try:
        entries: dict[str, list[int]] = json.loads(cache_path().read_text())
    except FileNotFoundError:
        return {}
    return entries


def write_cache(entries: dict[str, Tile]) -> None:
    """Adds entries to the cache file, atomically, and uses them from now on in this process."""
    path = cache_path()
    _read_cache.cache_clear()
    merged = {**_read_cache(), **{key: list(tile) for key, tile in entries.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    partial.replace(path)
    _read_cache.cache_clear()
