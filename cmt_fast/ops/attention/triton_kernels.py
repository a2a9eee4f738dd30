"""Attention with reduced keys and values on a GPU."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.attend import attend
from cmt_fast.ops._triton.tiles import load_tile


@triton.jit
def reduced_kv_attention_kernel(
    q,
    k,
    v,
    bias,
    out,
    lse,
    images,
    queries,
    keys,
    scale,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    bias_head,
    bias_row,
    bias_columns,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BASE2: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax(scale * q k^T + bias) v: a program does a tile of queries of one image and head.

    Images vary fastest: a tile of the bias, which they share, stays in the cache for all of them.

    Args:
        q: (images, HEADS, queries, KEY_DIM), k: (images, HEADS, keys, KEY_DIM), v: (images, HEADS, keys, VALUE_DIM), in the
            strides given, unit stride in a row.
        bias: (HEADS, queries, keys), rows bias_row apart, of which bias_columns columns may be read; or None.
        out: (images, queries, HEADS, VALUE_DIM), contiguous.
        lse: (images, HEADS, queries) float32, logarithms of the sums of the exponentials, for training; or None.
        BASE2: the logits are exponents of 2, not of e.
    """
    image = (tl.program_id(0) % images).to(tl.int64)
    head = (tl.program_id(0) // images % HEADS).to(tl.int64)
    first = (tl.program_id(0) // images // HEADS).to(tl.int64) * BLOCK_N
    left = queries - first
    query = load_tile(q + image * q_image + head * q_head + first * q_row, q_row, 0, left, 0, KEY_DIM, BLOCK_N, BLOCK_K)
    if bias is not None:
        bias += head * bias_head + first * bias_row
    result, level = attend(
        query,
        k + image * k_image + head * k_head,
        v + image * v_image + head * v_head,
        None,
        bias,
        k_row,
        v_row,
        0,
        bias_row,
        bias_columns,
        left,
        keys,
        scale,
        KEY_DIM,
        VALUE_DIM,
        BASE2,
        ONE_TILE,
        BLOCK_M,
        BLOCK_K,
        BLOCK_V,
        PRECISION,
    )
    out += ((image * queries + first) * HEADS + head) * VALUE_DIM
    row, dim = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_V)[None, :]
    inside = (row < left) & (dim < VALUE_DIM)
    tl.store(out + row * (HEADS * VALUE_DIM) + dim, result.to(out.dtype.element_ty), inside)
    if lse is not None:
        row = tl.arange(0, BLOCK_N)
        tl.store(lse + (image * HEADS + head) * queries + first + row, level, row < left)
