"""Tiles of the stem's convolutions, by shape and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tiling import block, fill

#: Of the image and of the stem: a program does all channels, and its product is unrolled.
MAX_CHANNELS = 128

#: Results of a tile: 64 in each thread.
_MAX_TILE = 64 * 32 * 4


@dataclass(frozen=True)
class ConvConfig:
    """How a convolution is launched: rows and columns of a tile, terms of a step of the product, channels, warps."""

    block_h: int
    block_w: int
    block_k: int
    block_s: int
    num_warps: int


@lru_cache(maxsize=1024)
def conv_config(images: int, height: int, width: int, channels: int, outputs: int, limits: DeviceLimits) -> ConvConfig:
    """For :func:`conv3x3_kernel`: the tile for a result (images, height, width, outputs) of an input with ``channels``.

    The taps of 8 x 16 pixels read 1.4 times as many pixels; those of a row of 128 would read 3 times as many.
    """
    block_s = block(outputs)
    pixels = fill(min(128, _MAX_TILE // block_s), _whole_tiles(height, width, 8, 16), images, limits)
    return ConvConfig(pixels // 16, 16, _terms(channels), block_s, num_warps=4)


@lru_cache(maxsize=1024)
def conv_embed_config(
    images: int, height: int, width: int, channels: int, outputs: int, exact: bool, limits: DeviceLimits
) -> ConvConfig | None:
    """For :func:`conv3x3_embed_kernel`: the tile for tokens (images, height, width, outputs) of maps with ``channels``.

    None where two kernels are better: for wide tokens, and for exact float32 products, which spill here.
    """
    block_s, block_c = block(channels), block(outputs)
    if exact or block_s * block_c > 128 * 128:
        return None
    tokens = min(64, _MAX_TILE // block_c, _MAX_TILE // block_s)
    tokens = fill(tokens, _whole_tiles(height, width, 8, 8), images, limits)
    return ConvConfig(tokens // 8, 8, _terms(channels), block_s, num_warps=4)


def _terms(channels: int) -> int:
    """Of a step of the product: one tap where that fits, so that the compiler knows which pixels it loads."""
    return channels if channels in (16, 32) else min(block(9 * channels), 32)


def _whole_tiles(height: int, width: int, rows: int, columns: int) -> int:
    """Pixels of a map with those that tiles of rows x columns add to it."""
    return -(-height // rows) * rows * -(-width // columns) * columns
