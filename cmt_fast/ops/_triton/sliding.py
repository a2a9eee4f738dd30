"""Depthwise 3x3 by sliding down the rows of a map: a row is read once, and goes into the three rows that it touches.

A program works on pairs of neighbouring columns, an even and an odd one (`e` and `o`), which share their loads. The columns of all images
lie side by side, so that narrow maps fill a tile too: a row of a tile is (PAIRS, BLOCK_C), and so is everything below unless it says else.
Offsets are 64-bit to the first image of a tile and 32-bit from there.
"""

import triton
import triton.language as tl


@triton.jit
def pair_columns(
    tile, c, images, height, width, C: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, PAIRS: tl.constexpr
):
    """Where the columns of a tile lie in a map (images, height, width, C).

    Args:
        tile: index of the PAIRS pairs.
        c: (1, BLOCK_C), the channels of the program.
        K: each image's columns are padded to a multiple of it.
        SPLIT: an image has an odd number of them, so that a pair may lie in two images.

    Returns:
        The first image of the tile; offsets of the even and odd columns from its first row; whether a pair lies in one image; and
        which elements lie in the map: left of the pairs, their even columns, their odd ones, right of the pairs.
    """
    channel = c < C
    pair = tile * PAIRS + tl.arange(0, PAIRS)[:, None]
    columns = tl.cdiv(width, K) * K
    first_image = tile * (2 * PAIRS) // columns
    row_size = width * C
    image_e, j_e = 2 * pair // columns, 2 * pair % columns
    offset_e = (image_e - first_image) * (height * row_size) + j_e * C + c
    if SPLIT:
        image_o, j_o = (2 * pair + 1) // columns, (2 * pair + 1) % columns
        offset_o = (image_o - first_image) * (height * row_size) + j_o * C + c
    else:
        image_o, j_o = image_e, j_e + 1
        offset_o = offset_e + C
    inside_e = (image_e < images) & (j_e < width) & channel
    inside_o = (image_o < images) & (j_o < width) & channel
    left = inside_e & (j_e > 0)
    right = inside_o & (j_o < width - 1)
    return first_image, offset_e, offset_o, image_e == image_o, left, inside_e, inside_o, right


@triton.jit
def load_taps(
    taps,
    c,
    channel,
    TAP_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    SHORTCUT: tl.constexpr,
    TURN: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The nine taps in the order of the rows, float32.

    Args:
        taps: tap t of channel c at t * TAP_STRIDE + c * CHANNEL_STRIDE.
        channel: which of the channels c there are.
        SHORTCUT: adds 1 to the centre.
        TURN: by 180 degrees, for the gradient of the map.
    """
    # One row of taps for each row of a tile, not one for all: they arrive in the threads that use them.
    tap = taps + tl.zeros((PAIRS, 1), tl.int32) + c * CHANNEL_STRIDE
    t0 = tl.load(tap, channel, 0.0).to(tl.float32)
    t1 = tl.load(tap + TAP_STRIDE, channel, 0.0).to(tl.float32)
    t2 = tl.load(tap + 2 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t3 = tl.load(tap + 3 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t4 = tl.load(tap + 4 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t5 = tl.load(tap + 5 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t6 = tl.load(tap + 6 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t7 = tl.load(tap + 7 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    t8 = tl.load(tap + 8 * TAP_STRIDE, channel, 0.0).to(tl.float32)
    if SHORTCUT:
        t4 += 1.0
    if TURN:
        return t8, t7, t6, t5, t4, t3, t2, t1, t0
    return t0, t1, t2, t3, t4, t5, t6, t7, t8


@triton.jit
def load_pairs(row, there, offset_e, offset_o, left, inside_e, inside_o, right, C: tl.constexpr):
    """A row of a map: left of the pairs, their even and odd columns, right of the pairs; 0 outside of the map.

    Args:
        row: pointer to the row, of which the offsets count.
        there: whether the map has this row.
    """
    return (
        tl.load(row + offset_e - C, left & there, 0.0),
        tl.load(row + offset_e, inside_e & there, 0.0),
        tl.load(row + offset_o, inside_o & there, 0.0),
        tl.load(row + offset_o + C, right & there, 0.0),
    )


@triton.jit
def load_own(row, there, offset_e, offset_o, inside_e, inside_o):
    """A row of a map without neighbours, 0 where it is not there: the even columns of the pairs and the odd ones."""
    return tl.load(row + offset_e, inside_e & there, 0.0), tl.load(row + offset_o, inside_o & there, 0.0)


@triton.jit
def neighbours(a, e, o, b, one, SPLIT: tl.constexpr):
    """What lies left of the even columns, in them, right of them, and the same of the odd ones, of a row of pairs, float32."""
    a, e, o, b = a.to(tl.float32), e.to(tl.float32), o.to(tl.float32), b.to(tl.float32)
    if SPLIT:
        return a, e, tl.where(one, o, 0.0), tl.where(one, e, 0.0), o, b
    return a, e, o, e, o, b


@triton.jit
def add_taps(y, left, centre, right, t_left, t_centre, t_right):
    """A row of three taps."""
    return y + left * t_left + centre * t_centre + right * t_right


@triton.jit
def add_row(y_e, y_o, row, t_left, t_centre, t_right):
    """A row of three taps, of the even and of the odd columns; row: of ``neighbours``."""
    e0, e1, e2, o0, o1, o2 = row
    return add_taps(y_e, e0, e1, e2, t_left, t_centre, t_right), add_taps(y_o, o0, o1, o2, t_left, t_centre, t_right)


@triton.jit
def slide(this, following, empty, left, centre, right, taps):
    """A row of x goes into the three rows of y that it touches. (At the upper end of a strip rows are missing: any tile stands for them.)

    Args:
        this, following: the unfinished rows of y: of the first only this row of x is missing, the second has only the row before.
        empty: what a row of y begins with.
        left, centre, right: the row of x and its neighbours, float32.
        taps: of ``load_taps``.

    Returns:
        The row of y that is finished, and the two that are unfinished now.
    """
    return (
        add_taps(this, left, centre, right, taps[6], taps[7], taps[8]),
        add_taps(following, left, centre, right, taps[3], taps[4], taps[5]),
        add_taps(empty, left, centre, right, taps[0], taps[1], taps[2]),
    )


@triton.jit
def add_products(sums, e0, e1, e2, o0, o1, o2, x_e, x_o):
    """The sums of a row of three taps, with the products of a row of the gradient of y and one of x added.

    Args:
        sums: of the left, the centre and the right tap.
        e0, e1, e2, o0, o1, o2: the row of the gradient, from ``neighbours``: what is right of a column of x saw it by the left tap.
        x_e, x_o: the even and the odd columns of the row of x.
    """
    x_e, x_o = x_e.to(tl.float32), x_o.to(tl.float32)
    return sums[0] + e2 * x_e + o2 * x_o, sums[1] + e1 * x_e + o1 * x_o, sums[2] + e0 * x_e + o0 * x_o


@triton.jit
def store_sums(partial, c, channel, upper, middle, lower):
    """Add up the pairs' sums of the three rows of taps, and store them to partial (C, 9), a program's own."""
    partial += c * 9
    tl.store(partial, tl.sum(upper[0], 0)[None, :], channel)
    tl.store(partial + 1, tl.sum(upper[1], 0)[None, :], channel)
    tl.store(partial + 2, tl.sum(upper[2], 0)[None, :], channel)
    tl.store(partial + 3, tl.sum(middle[0], 0)[None, :], channel)
    tl.store(partial + 4, tl.sum(middle[1], 0)[None, :], channel)
    tl.store(partial + 5, tl.sum(middle[2], 0)[None, :], channel)
    tl.store(partial + 6, tl.sum(lower[0], 0)[None, :], channel)
    tl.store(partial + 7, tl.sum(lower[1], 0)[None, :], channel)
    tl.store(partial + 8, tl.sum(lower[2], 0)[None, :], channel)
