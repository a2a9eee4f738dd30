"""Tiles of the head's 1x1 convolution, by shape, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.tiling import LEAST_BLOCK, block


@dataclass(frozen=True)
class FeaturesConfig:
    """How :func:`features_kernel` is launched: images and pixels, channels and features of a tile, warps, stages of the loop over channels."""

    images: int
    block_n: int
    block_c: int
    block_f: int
    num_warps: int
    num_stages: int


@lru_cache
def features_config(
    images: int, pixels: int, width: int, features: int, itemsize: int, exact: bool, limits: DeviceLimits
) -> FeaturesConfig:
    """The tile for maps (images, pixels, width): 64 pixels, or all, of as many images as 128 x 128 results take; fewer images and features where the
    grid would not fill the device.

    Args:
        itemsize: bytes of an element of the maps.
        exact: products are float32 without TF32.
    """
    most = 64 if exact else 128
    block_n, block_f = min(64, block(pixels)), min(most, block(features))
    together = min(most // block_n, 1 << (images - 1).bit_length())

    def programs() -> int:
        return -(-images // together) * -(-features // block_f)

    while programs() < limits.multiprocessors and together > 1:
        together //= 2
    while programs() < limits.multiprocessors and block_f > LEAST_BLOCK:
        block_f //= 2
    num_warps = 8 if exact or together * block_n * block_f > 8192 else 4
    return FeaturesConfig(together, block_n, min(block(width), 128 // itemsize), block_f, num_warps, num_stages=3)
