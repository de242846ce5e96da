"""Tiles: which one is used, how choices are measured, kept and read back."""

import json

import pytest
import torch

from lazypipe.kernels.gpu.tiles import (
    AMPERE,
    CANDIDATES,
    KERNELS,
    Tile,
    cache_key,
    cache_path,
    default_tile,
    fits,
    forced_tiles,
    padded_dim,
    shipped_tiles,
    tile_for,
)
from lazypipe.kernels.gpu.tuning import tune
from tests.kernels.problems import SMALL_TILES, make_problem

CPU = torch.device("cpu")


def test_every_default_fits_its_forward():
    for (kernel, dim, wide), tiles in CANDIDATES.items():
        assert fits(kernel, tiles[0], CANDIDATES["forward", dim, wide][0]) or kernel == "forward"


@pytest.mark.parametrize("capability", [8, 9])
def test_shipped_tiles_fit_together(capability):
    """Whichever forward tile is fastest, a backward tile can read its mask; and no tile ships that never could."""
    for _, dim, wide in {(0, *key[1:]) for key in CANDIDATES}:
        forwards = shipped_tiles("forward", dim, wide, capability)
        for kernel in ("query", "key", "bias"):
            tiles = shipped_tiles(kernel, dim, wide, capability)
            assert fits(kernel, tiles[0], forwards[0]), (kernel, dim, wide)
            for forward in forwards:
                assert any(fits(kernel, tile, forward) for tile in tiles), (kernel, dim, wide, forward)
            for tile in tiles:
                assert any(fits(kernel, tile, forward) for forward in forwards), (kernel, dim, wide, tile)


@pytest.mark.parametrize(("dim", "padded"), [(16, 16), (17, 32), (64, 64), (96, 128), (256, 256), (5, 16)])
def test_padded_dim(dim, padded):
    assert padded_dim(dim) == padded


def test_forced_tiles_are_put_back():
    before = tile_for("key", 64, torch.bfloat16, CPU)
    with forced_tiles({"key": Tile(16, 16, 4, 1)}):
        assert tile_for("key", 64, torch.bfloat16, CPU) == Tile(16, 16, 4, 1)
    assert tile_for("key", 64, torch.bfloat16, CPU) == before


def test_tiles_that_cannot_read_the_mask_are_refused():
    wide = {**SMALL_TILES, "query": Tile(64, 16, 4, 1)}
    with pytest.raises(ValueError, match=r"query tile .* cannot read the mask of forward tile"), forced_tiles(wide):
        pass


def test_tuning_keeps_the_fastest_and_passes_over_what_does_not_fit(monkeypatch):
    tiles = {
        "forward": (Tile(32, 16, 4, 1), Tile(32, 32, 4, 1)),
        "query": (Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)),
        "key": (Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)),
        "bias": (Tile(16, 16, 4, 1), Tile(32, 32, 4, 1)),
    }
    for kernel in KERNELS:
        monkeypatch.setitem(CANDIDATES, (kernel, 16, True), tiles[kernel])
    seen: list[int] = []

    def time_call(call):
        call()  # the candidate really runs
        seen.append(len(seen))
        if len(seen) == 1:
            raise RuntimeError("out of resource: shared memory")
        return 10.0 - len(seen)

    p = make_problem(0, query_len=33, window=5)
    best = tune(p.inputs, time_call)
    assert best["forward"] == Tile(32, 32, 4, 1), "the first one did not fit"
    assert best["query"] == Tile(16, 32, 4, 1), "the only one that reads the mask of that forward"
    assert best["key"] == Tile(16, 32, 4, 1), "the faster of two"
    stored = json.loads(cache_path().read_text())
    assert stored[cache_key("key", 16, True, "interpreter")] == [16, 32, 4, 1]


def test_tuning_does_not_hide_other_errors():
    def broken(_):
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune(make_problem(0, query_len=8, window=5).inputs, broken)


def test_measured_tile_is_used_on_its_gpu(monkeypatch):
    from lazypipe.kernels.gpu.tiles import write_cache

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    cuda = torch.device("cuda")
    default = tile_for("forward", 64, torch.bfloat16, cuda)
    chosen = CANDIDATES["forward", 64, False][1]
    write_cache({cache_key("forward", 64, False, "Some GPU"): chosen})
    assert tile_for("forward", 64, torch.bfloat16, cuda) == chosen != default
    assert tile_for("forward", 64, torch.float32, cuda) == CANDIDATES["forward", 64, True][0]


def test_ampere_defaults_fit_together():
    for (kernel, dim, wide), tile in AMPERE.items():
        assert fits(kernel, tile, default_tile("forward", dim, wide, 8)) or kernel == "forward"
        assert default_tile(kernel, dim, wide, 8) == tile
    assert default_tile("key", 64, False, 9) == CANDIDATES["key", 64, False][0]
