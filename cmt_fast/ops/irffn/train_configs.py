"""Tiles of the training kernels, by a rule from shape and dtype alone: moments and sums are cut by them, and no GPU may change their bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from cmt_fast.ops._triton import strips
from cmt_fast.ops._triton.products import is_exact
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, block, map_blocks, power_of_two

#: Programs that fill every GPU: grids of fewer get smaller tiles, and sums over the pixels are cut for so many.
PROGRAMS = 132

#: Largest tiles, rows and outputs: the expansion normalises its rows anew for each tile of outputs, so it wants many of these; the gradient
#: of the projection's input reads a tile of u besides.
EXPAND_TILE, PROJECT_INPUT_TILE = (64, 256), (64, 128)
#: Channels of x up to which a tile of the expansion's gradient holds whole rows, so that LayerNorm's gradient follows in the same program.
WHOLE_ROW = 256

#: Channels of x that a program of LayerNorm's gradient holds.
MAX_CHANNELS = 8192

_WARPS = 4
#: Elements of a tile of the depthwise kernels that a thread holds: a pair of columns by 4 channels. Beside each stand its tap and, in the
#: backward pass, the tap's sum.
_ELEMENTS = 8
#: Channels of their tiles: 128 bytes of 16 bits, so that narrow maps waste few lanes and a row of memory is read in whole lines.
_BLOCK_C = 64
#: Rows of the shortest strip: its two rows of halo and its partial sums are to be small beside it.
_MIN_ROWS = 8


@dataclass(frozen=True)
class ProductConfig:
    """A tile of a matrix product: rows, inputs and outputs; warps, stages of the loop. Of a weight's gradient the loop is that over rows."""

    block_n: int
    block_in: int
    block_out: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class StripConfig:
    """The tile of a depthwise kernel: rows of a strip, pairs of columns, channels."""

    rows: int
    pairs: int
    block_c: int
    num_warps: int = _WARPS


@lru_cache(maxsize=1024)
def product_config(
    rows: int,
    inputs: int,
    outputs: int,
    itemsize: int,
    exact: bool,
    most: tuple[int, int] = (128, 128),
) -> ProductConfig:
    """For a product (rows, inputs) by (inputs, outputs).

    Args:
        itemsize: bytes of an element of the operands.
        exact: products are float32 without TF32. Ordinary instructions make them, and want smaller tiles.
        most: rows and outputs of the largest tile whose registers do not spill.
    """
    most_n, most_out = (64, 64) if exact else most
    block_n, block_out = min(most_n, block(rows)), min(most_out, block(outputs))
    while -(-rows // block_n) * -(-outputs // block_out) < PROGRAMS and max(block_n, block_out) > 32:
        if block_n >= block_out:
            block_n //= 2
        else:
            block_out //= 2
    num_warps = 8 if block_n * block_out > 2048 else 4
    return ProductConfig(block_n, min(block(inputs), 128 // itemsize), block_out, num_warps, num_stages=2)


@lru_cache(maxsize=1024)
def expand_input_config(rows: int, inputs: int, outputs: int, itemsize: int, exact: bool) -> ProductConfig:
    """For the gradient of the expansion's input, of no more than ``WHOLE_ROW`` outputs: a tile has them all."""
    block_out = block(outputs)
    # Elements of the largest tile beside which x has room: more of them spill.
    elements = (4096 if exact else 8192) if itemsize == 4 else 64 * WHOLE_ROW
    block_n = min(64, elements // block_out, block(rows))
    while -(-rows // block_n) < PROGRAMS and block_n > LEAST_BLOCK:
        block_n //= 2
    num_warps = 8 if block_n * block_out > 4096 else 4
    return ProductConfig(block_n, min(block(inputs), 128 // itemsize), block_out, num_warps, num_stages=2)


@lru_cache(maxsize=1024)
def weight_config(rows: int, inputs: int, outputs: int, itemsize: int, exact: bool) -> tuple[ProductConfig, int]:
    """For the gradient (outputs, inputs) of a weight, summed over rows; and how many tiles of rows a program adds up."""
    most = 64 if exact else 128
    block_out = min(most, block(outputs))
    block_in = min(most * most // block_out, 2 * most, block(inputs))  # of few outputs, all of 256 inputs
    block_n = min(32 if itemsize == 4 else 64, block(rows))
    tiles = -(-inputs // block_in) * -(-outputs // block_out)
    steps = -(-rows // (block_n * -(-PROGRAMS // tiles)))
    return ProductConfig(block_n, block_in, block_out, 8, num_stages=2), steps


@lru_cache(maxsize=1024)
def strip_config(images: int, height: int, width: int, channels: int) -> StripConfig:
    """For the depthwise kernels on maps (images, height, width, channels)."""
    block_c = min(power_of_two(channels), _BLOCK_C)
    pairs = _ELEMENTS // 2 * 32 * _WARPS // block_c
    programs = -(-images * width // (2 * pairs)) * -(-channels // block_c)
    strips = min(-(-8 * PROGRAMS // programs), -(-height // _MIN_ROWS))
    return StripConfig(-(-height // strips), pairs, block_c)


def product_programs(rows: int, inputs: int, outputs: int, dtype: torch.dtype, expands: bool = False) -> int:
    """How many tiles of rows the forward product has, each with moments of its own."""
    most = (EXPAND_TILE,) if expands else ()
    config = product_config(int(rows), inputs, outputs, dtype.itemsize, is_exact(dtype), *most)
    return -(-int(rows) // config.block_n)


def strip_programs(images: int, height: int, width: int, channels: int) -> int:
    """How many strips a depthwise kernel has for each tile of channels, each with moments or sums of its own."""
    images, height, width = int(images), int(height), int(width)
    config = strip_config(images, height, width, channels)
    return strips.strip_programs(images, height, width, config.rows, config.pairs)


def tile_reasons(shape: Sequence[int], hidden: int) -> list[str]:
    """Reasons why x (B, H, W, C) with so many hidden channels would not fit the tiles; an empty list if it does."""
    reasons = strips.map_reasons((*shape[:3], hidden), 1, _ELEMENTS * 32 * _WARPS)
    if shape[3] > MAX_CHANNELS:
        reasons.append(f"x must have at most {MAX_CHANNELS} channels, got {shape[3]}")
    return reasons


def element_blocks(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile of an elementwise kernel."""
    return map_blocks(channels, 2048)


def row_block(channels: int) -> int:
    """How many whole rows of so many channels a program holds."""
    return max(1, min(32, MAX_CHANNELS // block(channels)))
