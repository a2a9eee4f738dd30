"""The gradients of attention with reduced keys and values on a GPU (docs/math.md, section 4)."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.attend import attend_backward
from cmt_fast.ops._triton.tiles import load_tile, store_tile


@triton.jit
def attention_backward_kernel(
    grad,
    q,
    k,
    v,
    bias,
    lse,
    delta,
    dq,
    dk,
    dv,
    dlogits,
    images,
    queries,
    keys,
    part_queries,
    scale,
    grad_image,
    grad_head,
    grad_row,
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
    DK_ROW: tl.constexpr,
    DV_ROW: tl.constexpr,
    LOGITS_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a tile of keys, kept in registers over a part of the queries of one image and head; and what a tile of queries
    needs of these keys.

    Where the tile holds all keys, dq is whole, and the row sums delta are made here, of what is in registers: that is cheaper than
    reading the output. Otherwise :func:`query_gradient_kernel` has made dq and delta before.

    Args:
        grad, q, k, v, bias: as :func:`cmt_fast.functional.reduced_kv_attention` has them, any strides but one in a row.
        lse, delta: (images, HEADS, queries) float32; delta None if the tile holds all keys.
        dq: (images, queries, HEADS, KEY_DIM), contiguous; or None.
        dk: (parts, images, keys, DK_ROW), of which a head has KEY_DIM columns, the first head the first; dv likewise; or None.
        dlogits: (images, HEADS, queries, LOGITS_ROW), zero beyond the keys; or None.
        part_queries: queries of a part.
    """
    image = (tl.program_id(0) % images).to(tl.int64)
    head = (tl.program_id(0) // images % HEADS).to(tl.int64)
    start_key = tl.program_id(0) // images // HEADS * BLOCK_M
    part = tl.program_id(1).to(tl.int64)
    grad += image * grad_image + head * grad_head
    q += image * q_image + head * q_head
    lse += (image * HEADS + head) * queries
    if delta is not None:
        delta += (image * HEADS + head) * queries
    key_rows = load_tile(k + image * k_image + head * k_head, k_row, start_key, keys, 0, KEY_DIM, BLOCK_M, BLOCK_K)
    value_rows = load_tile(v + image * v_image + head * v_head, v_row, start_key, keys, 0, VALUE_DIM, BLOCK_M, BLOCK_V)
    dk_sum = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    dv_sum = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in range(part * part_queries, tl.minimum((part + 1) * part_queries, queries), BLOCK_N):
        left = queries - first
        row = tl.arange(0, BLOCK_N)
        query = load_tile(q + first * q_row, q_row, 0, left, 0, KEY_DIM, BLOCK_N, BLOCK_K)
        g = load_tile(grad + first * grad_row, grad_row, 0, left, 0, VALUE_DIM, BLOCK_N, BLOCK_V)
        table = bias
        if bias is not None:
            table += head * bias_head + first * bias_row
        sums = None
        if delta is not None:
            sums = tl.load(delta + first + row, row < left, 0.0)
        weights, change = attend_backward(
            query,
            g,
            key_rows,
            value_rows,
            table,
            lse + first,
            sums,
            bias_row,
            bias_columns,
            left,
            keys,
            scale,
            start_key,
            PRECISION,
        )
        if dlogits is not None:
            place = dlogits + ((image * HEADS + head) * queries + first) * LOGITS_ROW + start_key
            store_tile(place, change, LOGITS_ROW, left, LOGITS_ROW - start_key)
        if dv is not None:
            dv_sum = tl.dot(tl.trans(weights), g, dv_sum, input_precision=PRECISION)
        if dk is not None:
            dk_sum = tl.dot(tl.trans(change), query, dk_sum, input_precision=PRECISION)
        if dq is not None:
            found = tl.dot(change, key_rows, input_precision=PRECISION) * scale
            place = dq + ((image * queries + first) * HEADS + head) * KEY_DIM
            store_tile(place, found, HEADS * KEY_DIM, left, KEY_DIM)
    left = keys - start_key
    first_row = (part * images + image) * keys + start_key
    if dk is not None:
        store_tile(dk + first_row * DK_ROW + head * KEY_DIM, dk_sum * scale, DK_ROW, left, KEY_DIM)
    if dv is not None:
        store_tile(dv + first_row * DV_ROW + head * VALUE_DIM, dv_sum, DV_ROW, left, VALUE_DIM)


@triton.jit
def query_gradient_kernel(
    grad,
    q,
    k,
    v,
    bias,
    lse,
    out,
    delta,
    dq,
    images,
    queries,
    keys,
    scale,
    grad_image,
    grad_head,
    grad_row,
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
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta and dq of a tile of queries of one image and head, over all its keys, which stream through.

    delta = sum_m P_nm dP_nm = o_n . do_n, by its second form: the first would take a pass over the keys of its own.

    Args:
        out: (images, queries, HEADS, VALUE_DIM), contiguous, the output of the forward pass.
        delta: (images, HEADS, queries) float32. dq: (images, queries, HEADS, KEY_DIM), contiguous, or None.
        others: as of :func:`attention_backward_kernel`.
    """
    image = (tl.program_id(0) % images).to(tl.int64)
    head = (tl.program_id(0) // images % HEADS).to(tl.int64)
    first = (tl.program_id(0) // images // HEADS).to(tl.int64) * BLOCK_N
    left = queries - first
    row = tl.arange(0, BLOCK_N)
    g = load_tile(
        grad + image * grad_image + head * grad_head + first * grad_row,
        grad_row,
        0,
        left,
        0,
        VALUE_DIM,
        BLOCK_N,
        BLOCK_V,
    )
    o = load_tile(
        out + ((image * queries + first) * HEADS + head) * VALUE_DIM,
        HEADS * VALUE_DIM,
        0,
        left,
        0,
        VALUE_DIM,
        BLOCK_N,
        BLOCK_V,
    )
    sums = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    lse += (image * HEADS + head) * queries + first
    tl.store(delta + (image * HEADS + head) * queries + first + row, sums, row < left)
    if dq is not None:
        k += image * k_image + head * k_head
        v += image * v_image + head * v_head
        query = load_tile(
            q + image * q_image + head * q_head + first * q_row, q_row, 0, left, 0, KEY_DIM, BLOCK_N, BLOCK_K
        )
        if bias is not None:
            bias += head * bias_head + first * bias_row
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, keys, BLOCK_M):
            key_rows = load_tile(k, k_row, start, keys, 0, KEY_DIM, BLOCK_M, BLOCK_K)
            value_rows = load_tile(v, v_row, start, keys, 0, VALUE_DIM, BLOCK_M, BLOCK_V)
            _, change = attend_backward(
                query,
                g,
                key_rows,
                value_rows,
                bias,
                lse,
                sums,
                bias_row,
                bias_columns,
                left,
                keys,
                scale,
                start,
                PRECISION,
            )
            total = tl.dot(change, key_rows, total, input_precision=PRECISION)
        dq += ((image * queries + first) * HEADS + head) * KEY_DIM
        store_tile(dq, total * scale, HEADS * KEY_DIM, left, KEY_DIM)
