"""Tiles of the IRFFN's kernels, by shape, dtype and device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cmt_fast.ops._triton.device import OPERANDS_IN_SHARED_MEMORY, DeviceLimits
from cmt_fast.ops._triton.linear_config import linear_config
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, around, block, neighbours
from cmt_fast.ops._triton.tunable import tunable

#: Hidden channels times squares of 2 x 2 pixels that a program convolves at a time: 16 or 32 values a thread, whose neighbours and taps
#: fill the registers that the accumulators leave.
CONVOLVED = 1024
#: Squares of the largest tile, and outputs that its accumulators hold without a spill; half as many squares have room for twice the outputs.
MAX_QUADS, MAX_OUTPUTS = 32, 256

#: Sums of a product, and convolved pixels, that a thread has registers for.
_SUMS, _PIXELS = 128, 32


@dataclass(frozen=True)
class ExpandConfig:
    """How :func:`expand_kernel` is launched: see there."""

    held: bool
    chunks: int
    block_n: int
    block_c: int
    block_rest: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ProjectConfig:
    """How :func:`depthwise_project_kernel` is launched: see there."""

    quads: int
    block_c: int
    block_rest: int
    block_r: int
    num_warps: int


@dataclass(frozen=True)
class DepthwiseConfig:
    """How :func:`depthwise_gelu_kernel` is launched: see there."""

    chunks: int
    quads: int
    block_r: int
    num_warps: int


def split_width(width: int, most: int) -> tuple[int, int]:
    """The sides of two tiles that hold ``width`` channels; the second is 0 where it would not make their sum less.

    Args:
        most: the largest side that need not be halved.
    """
    whole = block(width)
    main = max(LEAST_BLOCK, whole // 2)
    rest = block(width - main) if width > main else 0
    return (whole, 0) if main + rest >= whole and whole <= most else (main, rest)


def expand_candidates(
    rule: ExpandConfig, rows: int, width: int, hidden: int, itemsize: int, exact: bool, limits: DeviceLimits
) -> Iterator[ExpandConfig]:
    """Other tiles that fit into shared memory; arguments as of :func:`expand_config`."""
    for config in neighbours(
        rule,
        chunks=around(rule.chunks, 1, -(-hidden // rule.block_r)) if rule.held else (),
        block_n=around(rule.block_n, LEAST_BLOCK, 128),
        block_r=around(rule.block_r, LEAST_BLOCK, 128),
        num_warps=(4, 8),
        num_stages=(1, 2, 3),
    ):
        sums = config.block_n * config.block_r / (32 * config.num_warps)
        if sums <= _SUMS and _expand_shared(config, itemsize) <= limits.shared_memory:
            yield config


@tunable("cmt_fast.ops.irffn.triton_kernels:expand_kernel", expand_candidates)
def expand_config(rows: int, width: int, hidden: int, itemsize: int, exact: bool, limits: DeviceLimits) -> ExpandConfig:
    """For :func:`expand_kernel`.

    Args:
        width: channels C, padding included; hidden: R.
        itemsize: bytes of an element of the stream.
        exact: products are float32 without TF32. Ordinary instructions make them, and want smaller tiles.
    """
    if not exact and (config := _held_config(rows, width, hidden, itemsize, limits)):
        return config
    plain = linear_config.rule(rows, width, hidden, itemsize, exact, limits)
    return ExpandConfig(False, 1, plain.block_n, plain.block_c, 0, plain.block_out, plain.num_warps, plain.num_stages)


def _held_config(rows: int, width: int, hidden: int, itemsize: int, limits: DeviceLimits) -> ExpandConfig | None:
    """With the rows of a program kept; None if shared memory cannot hold the least of them."""
    multiprocessors, in_registers = limits.multiprocessors, limits.arch not in OPERANDS_IN_SHARED_MEMORY
    main, rest = split_width(width, most=256)
    held = main + rest
    most_rows = min(128 if held <= 320 else 64, block(rows))
    most_hidden = min(64 if held <= 128 else 128, block(hidden))
    while most_rows > 64 and -(-rows // most_rows) * -(-hidden // 64) < multiprocessors:
        most_rows //= 2
    while most_hidden > 32 and -(-rows // most_rows) * -(-hidden // most_hidden) < multiprocessors:
        most_hidden //= 2
    for least in (64, 32, LEAST_BLOCK):
        for block_n in _halved(most_rows, least):
            for num_stages in (2,) if in_registers else (2, 1):
                for block_r in _halved(most_hidden, least):
                    num_warps = 8 if block_n * held > 8192 and (block_n > 64 or in_registers) else 4
                    chunks = _chunks(-(-rows // block_n), -(-hidden // block_r), multiprocessors)
                    config = ExpandConfig(True, chunks, block_n, main, rest, block_r, num_warps, num_stages)
                    # Where operands go through registers, the stage at work is not kept.
                    kept = replace(config, num_stages=num_stages - in_registers)
                    if _expand_shared(kept, itemsize) <= limits.shared_memory:
                        return config
    return None


def _expand_shared(config: ExpandConfig, itemsize: int) -> int:
    """Bytes of shared memory: the rows (held, or a tile of them a stage), the weights, and a tile of the result on its way out."""
    stages, channels = config.num_stages, config.block_c + config.block_rest
    rows = config.block_n * (1 if config.held else stages)
    return ((rows + stages * config.block_r) * channels + config.block_n * config.block_r) * itemsize


def project_candidates(
    rule: ProjectConfig,
    images: int,
    height: int,
    width: int,
    channels: int,
    hidden: int,
    itemsize: int,
    limits: DeviceLimits,
) -> Iterator[ProjectConfig]:
    """Other tiles that fit into registers; arguments as of :func:`project_config`."""
    for config in neighbours(
        rule,
        quads=around(rule.quads, LEAST_BLOCK // 4, 64),
        block_r=around(rule.block_r, LEAST_BLOCK, 256),
        num_warps=(4, 8),
    ):
        pixels, outputs = 4 * config.quads / (32 * config.num_warps), config.block_c + config.block_rest
        shared = (4 * config.quads + outputs) * config.block_r * itemsize
        if pixels * outputs <= _SUMS and pixels * config.block_r <= _PIXELS and shared <= limits.shared_memory:
            yield config


@tunable("cmt_fast.ops.irffn.triton_kernels:depthwise_project_kernel", project_candidates)
def project_config(
    images: int, height: int, width: int, channels: int, hidden: int, itemsize: int, limits: DeviceLimits
) -> ProjectConfig | None:
    """For :func:`depthwise_project_kernel`; None where two kernels (depthwise and GELU, projection) are better.

    These are better where registers hold the accumulators of few pixels only, whose program would read all weights again and again: beyond
    512 channels (256 where operands take registers too), and for float32.
    """
    main, rest = split_width(channels, most=2 * MAX_OUTPUTS)
    most = 2 * MAX_OUTPUTS if limits.arch in OPERANDS_IN_SHARED_MEMORY else MAX_OUTPUTS
    if itemsize > 2 or main + rest > most:
        return None
    count = images * -(-height // 2) * -(-width // 2)
    quads = MAX_QUADS if main + rest <= MAX_OUTPUTS else MAX_QUADS // 2
    while quads > LEAST_BLOCK // 4 and -(-count // quads) < limits.multiprocessors:
        quads //= 2
    # Where that is not enough, several programs convolve the same pixels for some outputs each.
    while main > 32 and -(-count // quads) * -(-channels // (main + rest)) < limits.multiprocessors:
        main, rest = (main // 2, 0) if rest == 0 else (main, 0)
    num_warps = 8 if 4 * quads * (main + rest) > 8192 else 4
    return ProjectConfig(quads, main, rest, min(CONVOLVED // quads, block(hidden)), num_warps)


def depthwise_candidates(
    rule: DepthwiseConfig, images: int, height: int, width: int, hidden: int, limits: DeviceLimits
) -> Iterator[DepthwiseConfig]:
    """Other tiles that fit into registers; arguments as of :func:`depthwise_config`."""
    for config in neighbours(
        rule,
        chunks=around(rule.chunks, 1, -(-hidden // rule.block_r)),
        quads=around(rule.quads, 1, 64),
        block_r=around(rule.block_r, LEAST_BLOCK, 256),
        num_warps=(2, 4, 8),
    ):
        if 4 * config.quads * config.block_r / (32 * config.num_warps) <= _PIXELS:
            yield config


@tunable("cmt_fast.ops.irffn.triton_kernels:depthwise_gelu_kernel", depthwise_candidates)
def depthwise_config(images: int, height: int, width: int, hidden: int, limits: DeviceLimits) -> DepthwiseConfig:
    """For :func:`depthwise_gelu_kernel`."""
    block_r = min(128, block(hidden))
    count, chunks = images * -(-height // 2) * -(-width // 2), -(-hidden // block_r)
    quads = CONVOLVED // block_r
    while quads > 1 and -(-count // quads) * chunks < limits.multiprocessors:
        quads //= 2
    # Several tiles of channels share the positions of their pixels, as long as there are some programs for each multiprocessor.
    together = chunks
    while together > 1 and -(-count // quads) * -(-chunks // together) < 8 * limits.multiprocessors:
        together = -(-together // 2)
    return DepthwiseConfig(together, quads, block_r, num_warps=4)


def map_reasons(height: int, width: int, channels: int) -> list[str]:
    """Reasons why offsets inside of an image of a map, of ``channels`` at most, would not fit into 32 bits; an empty list if they do."""
    elements = (height * width + 4 * width + 4 * CONVOLVED) * channels
    if elements < 2**31:
        return []
    return [f"the map of one image must have less than 2^31 elements, got {elements} with what a tile adds"]


def _chunks(tiles: int, chunks: int, multiprocessors: int) -> int:
    """How many chunks of hidden channels a program does: the least time if its rows cost as much as a chunk."""
    return min(range(chunks, 0, -1), key=lambda n: -(-tiles * -(-chunks // n) // multiprocessors) * (n + 1))


def _halved(size: int, least: int) -> list[int]:
    """``size``, its half, ... down to ``least``, if it is that large."""
    return [size >> i for i in range(size.bit_length()) if size >> i >= min(size, least)]
