"""The 1x1 convolution, swish and average pool of a head on a GPU."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.tiles import load_tile


@triton.jit
def features_kernel(
    x,
    weight,
    bias,
    y,
    images,
    pixels,
    C: tl.constexpr,
    F: tl.constexpr,
    POOL: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = swish(x weight^T + bias), with POOL its mean over the pixels of an image.

    A program does BLOCK_F features of IMAGES images, BLOCK_N pixels of each at a time: sums of an image have one order.

    Args:
        x: (images, pixels, C). weight: (F, C). bias: (F,).
        y: (images, F) with POOL, else (images, pixels, F).
    """
    tiles = tl.cdiv(F, BLOCK_F)
    column = tl.program_id(0) % tiles * BLOCK_F
    f = column + tl.arange(0, BLOCK_F)[None, :]
    place = tl.arange(0, IMAGES * BLOCK_N)[:, None]
    first = tl.program_id(0) // tiles * IMAGES
    image = first + place // BLOCK_N
    biases = tl.load(bias + f, f < F, 0.0)
    sums = tl.zeros([IMAGES, BLOCK_F], tl.float32)
    for start in range(0, pixels, BLOCK_N):
        pixel = start + place % BLOCK_N
        inside = (image < images) & (pixel < pixels)
        row = image.to(tl.int64) * pixels + pixel
        total = tl.zeros([IMAGES * BLOCK_N, BLOCK_F], tl.float32)
        for channel in range(0, C, BLOCK_C):
            c = channel + tl.arange(0, BLOCK_C)[None, :]
            tile = tl.load(x + row * C + c, inside & (c < C), 0.0)
            weights = load_tile(weight + column * C, C, 0, F - column, channel, C, BLOCK_F, BLOCK_C)
            total = tl.dot(tile, tl.trans(weights), total, input_precision=PRECISION)
        total += biases
        total *= 1.0 / (1.0 + tl.exp2(total * -1.4426950408889634))  # log2(e)
        if POOL:
            sums += tl.sum(tl.reshape(tl.where(inside, total, 0.0), (IMAGES, BLOCK_N, BLOCK_F)), 1)
        else:
            tl.store(y + row * F + f, total.to(y.dtype.element_ty), inside & (f < F))
    if POOL:
        image = first + tl.arange(0, IMAGES)[:, None]
        mean = sums / pixels
        tl.store(y + image.to(tl.int64) * F + f, mean.to(y.dtype.element_ty), (image < images) & (f < F))
