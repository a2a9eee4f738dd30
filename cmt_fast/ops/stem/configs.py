"""Tiles of the stem's convolutions, by shape and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, block, fill

#: Of the image and of the stem: a program does all channels, and its product is unrolled.
MAX_CHANNELS = 128

#: Results of a tile: 128 pixels of up to 64 channels.
_MAX_TILE = 128 * 64
#: Rows and columns of a tile. Its taps read 1.4 times its pixels; those of a row of 128 pixels would read 3 times.
_ROWS, _COLUMNS = 8, LEAST_BLOCK


@dataclass(frozen=True)
class ConvConfig:
    """How :func:`conv3x3_kernel` is launched: rows and columns of a tile, terms of a step of the product, channels, warps."""

    block_h: int
    block_w: int
    block_k: int
    block_s: int
    num_warps: int


@lru_cache(maxsize=1024)
def conv_config(images: int, height: int, width: int, channels: int, outputs: int, limits: DeviceLimits) -> ConvConfig:
    """The tile for a result (images, height, width, outputs) of an input with ``channels``."""
    block_s = block(outputs)
    whole = _round_up(height, _ROWS) * _round_up(width, _COLUMNS)
    pixels = fill(min(_ROWS * _COLUMNS, _MAX_TILE // block_s), whole, images, limits)
    # Steps of one tap where that fits: which pixels it loads is then known to the compiler.
    block_k = channels if channels in (16, 32) else min(block(9 * channels), 32)
    return ConvConfig(pixels // _COLUMNS, _COLUMNS, block_k, block_s, num_warps=4)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
