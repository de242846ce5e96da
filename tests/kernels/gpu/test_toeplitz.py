"""The bias as tiles, and its gradient from tiles, against loops."""

import math

import pytest
import torch

from lazypipe.kernels.gpu.toeplitz import bias_gradient, bias_tiles, tile_count, tile_step


@pytest.mark.parametrize(("block_m", "block_n"), [(4, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize(("window", "shift"), [(1, 0), (9, 0), (9, 3), (30, 13)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_block_finds_its_bias(block_m, block_n, window, shift, transposed):
    bias = torch.randn(2, window)
    tiles = bias_tiles(bias, shift, block_m, block_n, transposed)
    assert tiles.is_contiguous(), "kernels count rows of it by the number of columns"
    if transposed:
        tiles = tiles.transpose(2, 3)
    assert tiles.shape == (2, tile_count(window, shift, block_m, block_n), block_m, block_n)
    for row0 in range(0, 40, block_m):
        for key0 in range(0, row0 + shift + block_m, block_n):
            delta = row0 + shift - key0
            if delta >= window + block_n - 1:
                continue  # wholly beyond the window: the kernels load nothing
            tile = tiles[:, (delta + block_m) // tile_step(block_m, block_n)]
            for m in range(block_m):
                for n in range(block_n):
                    distance = delta + m - n
                    inside = 0 <= distance < window
                    expected = bias[:, distance] * math.log2(math.e) if inside else torch.zeros(2)
                    torch.testing.assert_close(tile[:, m, n], expected)


@pytest.mark.parametrize(("window", "first_delta"), [(1, -4), (10, -4), (10, -1), (50, -3)])
def test_diagonals_are_summed(window, first_delta):
    heads, count, size = 2, 6, 4
    tiles = torch.randn(heads, count, size, size)
    expected = torch.zeros(heads, window)
    for t in range(count):
        for m in range(size):
            for n in range(size):
                distance = first_delta + t * size + m - n
                if 0 <= distance < window:
                    expected[:, distance] += tiles[:, t, m, n]
    torch.testing.assert_close(bias_gradient(tiles, first_delta, size, window), expected)
