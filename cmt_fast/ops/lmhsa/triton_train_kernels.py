"""The core of the attention sub-layer in training: from the stream through LayerNorm, queries, attention and projection to the stream."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.attend import attend, attend_backward
from cmt_fast.ops._triton.linear import row_statistics
from cmt_fast.ops._triton.norm import affine, normalise_rows
from cmt_fast.ops._triton.tiles import load_tile, store_tile


@triton.jit
def core_forward_kernel(
    x,
    norm_weight,
    norm_bias,
    query_weight,
    query_bias,
    keys_values,
    table,
    out_weight,
    out_bias,
    row_scale,
    out,
    lse,
    images,
    tokens,
    keys,
    scale,
    table_head,
    table_row,
    table_columns,
    eps,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NORM: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = [x +] row_scale * (sum over heads of softmax(scale * q_h k_h^T + table_h) v_h Wo_h^T + bo), where q_h = LN(x) Wq_h^T + bq_h.

    A program does a tile of tokens of one image. Images vary fastest: a tile of the table, which they share, stays in the cache.

    Args:
        x, out: (images, tokens, C), in dtypes of their own.
        norm_weight, norm_bias: (C,), or None. query_bias: (HEADS * KEY_DIM,), out_bias: (C,), row_scale: (images,), or None.
        query_weight: (HEADS * KEY_DIM, C), out_weight: (C, HEADS * VALUE_DIM), keys_values: (images, keys, HEADS * (KEY_DIM + VALUE_DIM)),
            in the dtype of the products.
        table: (HEADS, tokens, keys), heads table_head and rows table_row apart, of which table_columns >= keys columns may be read.
        lse: (images, HEADS, tokens) float32.
    """
    KV_ROW: tl.constexpr = HEADS * (KEY_DIM + VALUE_DIM)
    image = (tl.program_id(0) % images).to(tl.int64)
    first = (tl.program_id(0) // images).to(tl.int64) * BLOCK_N
    left = tokens - first
    x += (image * tokens + first) * C
    out += (image * tokens + first) * C
    table += first * table_row
    keys_values += image * keys * KV_ROW
    normal = _normal_rows(x, norm_weight, norm_bias, left, eps, C, NORM, BLOCK_N, BLOCK_C)
    normal = normal.to(query_weight.dtype.element_ty)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for head in range(HEADS):
        weight = load_tile(query_weight + head * KEY_DIM * C, C, 0, KEY_DIM, 0, C, BLOCK_K, BLOCK_C)
        query = tl.dot(normal, tl.trans(weight), input_precision=PRECISION)
        if query_bias is not None:
            query += _vector(query_bias + head * KEY_DIM, KEY_DIM, BLOCK_K)
        values, level = attend(
            query.to(normal.dtype),
            keys_values + head * KEY_DIM,
            keys_values + HEADS * KEY_DIM + head * VALUE_DIM,
            None,
            table,
            KV_ROW,
            KV_ROW,
            0,
            table_row,
            table_columns,
            left,
            keys,
            scale,
            KEY_DIM,
            VALUE_DIM,
            False,
            True,
            BLOCK_M,
            BLOCK_K,
            BLOCK_V,
            PRECISION,
        )
        row = tl.arange(0, BLOCK_N)
        tl.store(lse + (image * HEADS + head) * tokens + first + row, level, row < left)
        weight = load_tile(out_weight + head * VALUE_DIM, HEADS * VALUE_DIM, 0, C, 0, VALUE_DIM, BLOCK_C, BLOCK_V)
        total = tl.dot(values.to(normal.dtype), tl.trans(weight), total, input_precision=PRECISION)
        table += table_head
    if out_bias is not None:
        total += _vector(out_bias, C, BLOCK_C)
    if row_scale is not None:
        total *= tl.load(row_scale + image).to(tl.float32)
    if SHORTCUT:  # x is read again, from the cache: holding it would take registers from the products
        total += load_tile(x, C, 0, left, 0, C, BLOCK_N, BLOCK_C).to(tl.float32)
    store_tile(out, total, C, left, C)


@triton.jit
def core_backward_kernel(
    grad,
    x,
    norm_weight,
    norm_bias,
    query_weight,
    query_bias,
    keys_values,
    table,
    out_weight,
    row_scale,
    lse,
    dy,
    dq,
    attended,
    moments,
    dkeys_values,
    dlogits,
    images,
    tokens,
    keys,
    part_tokens,
    scale,
    table_head,
    table_row,
    table_columns,
    eps,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    LOGITS_ROW: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of one image and head over a part of its tokens, from the stream, the keys and values and the log-sum-exps: dk and dv stay in
    registers, dq and the output of the attention, which the gradients of the weights are products of, are written once.

    Heads vary fastest: the rows of x and grad, which they share, stay in the cache. The first of them writes what belongs to all.

    Args:
        grad: (images, tokens, C), of ``out``; x and the parameters as of :func:`core_forward_kernel`.
        dy: (images, tokens, C), of LN(x), in the dtype of the products; or None, as it must be with several heads, whose sum it is.
        dq: (images, tokens, HEADS, KEY_DIM), attended: (images, tokens, HEADS, VALUE_DIM), the output of the attention; in the dtype of the
            products; each None if not needed.
        moments: (images * tokens, 2) float32, mean and 1 / sigma of each row of x, or None.
        dkeys_values: (parts, images, keys, HEADS * (KEY_DIM + VALUE_DIM)), or None.
        dlogits: (images, HEADS, tokens, LOGITS_ROW), zero beyond the keys, or None.
        part_tokens: tokens of a part.
    """
    KV_ROW: tl.constexpr = HEADS * (KEY_DIM + VALUE_DIM)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    image = (tl.program_id(0) // HEADS).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    keys_values += image * keys * KV_ROW
    key_rows = load_tile(keys_values + head * KEY_DIM, KV_ROW, 0, keys, 0, KEY_DIM, BLOCK_M, BLOCK_K)
    value_rows = load_tile(
        keys_values + HEADS * KEY_DIM + head * VALUE_DIM, KV_ROW, 0, keys, 0, VALUE_DIM, BLOCK_M, BLOCK_V
    )
    factor = 1.0
    if row_scale is not None:
        factor = tl.load(row_scale + image).to(tl.float32)
    lse += (image * HEADS + head) * tokens
    dk = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    dtype = query_weight.dtype.element_ty
    last = tl.minimum((part + 1) * part_tokens, tokens)
    for first in tl.range(
        part * part_tokens, last, BLOCK_N, disable_licm=True
    ):  # addresses hoisted out of it would spill
        left = tokens - first
        token = image * tokens + first
        if NORM:
            mean, rstd = row_statistics(x + token * C, left, eps, C, C, BLOCK_N, BLOCK_C)
            if moments is not None and head == 0:
                row = tl.arange(0, BLOCK_N)
                tl.store(moments + 2 * (token + row), mean, row < left)
                tl.store(moments + 2 * (token + row) + 1, rstd, row < left)
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, C, BLOCK_C):
            rows = load_tile(x + token * C, C, 0, left, start, C, BLOCK_N, BLOCK_C).to(tl.float32)
            if NORM:
                rows = (rows - mean[:, None]) * rstd[:, None]
                rows = affine(rows, norm_weight, norm_bias, start + tl.arange(0, BLOCK_C)[None, :], C)
            weight = load_tile(query_weight + head * KEY_DIM * C, C, 0, KEY_DIM, start, C, BLOCK_K, BLOCK_C)
            total = tl.dot(rows.to(dtype), tl.trans(weight), total, input_precision=PRECISION)
        if query_bias is not None:
            total += _vector(query_bias + head * KEY_DIM, KEY_DIM, BLOCK_K)
        query = total.to(dtype)
        total = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in range(0, C, BLOCK_C):
            scaled = load_tile(grad + token * C, C, 0, left, start, C, BLOCK_N, BLOCK_C).to(tl.float32) * factor
            weight = load_tile(
                out_weight + head * VALUE_DIM, HEADS * VALUE_DIM, start, C, 0, VALUE_DIM, BLOCK_C, BLOCK_V
            )
            total = tl.dot(scaled.to(dtype), weight, total, input_precision=PRECISION)
        dvalues = total.to(dtype)
        weights, change = attend_backward(
            query,
            dvalues,
            key_rows,
            value_rows,
            table + head * table_head + first * table_row,
            lse + first,
            None,
            table_row,
            table_columns,
            left,
            keys,
            scale,
            0,
            PRECISION,
        )
        if dlogits is not None:
            place = dlogits + ((image * HEADS + head) * tokens + first) * LOGITS_ROW
            store_tile(place, change, LOGITS_ROW, left, LOGITS_ROW)
        if attended is not None:
            values = tl.dot(weights, value_rows, input_precision=PRECISION)
            place = attended + (token * HEADS + head) * VALUE_DIM
            store_tile(place, values, HEADS * VALUE_DIM, left, VALUE_DIM)
        if dkeys_values is not None:
            dv = tl.dot(tl.trans(weights), dvalues, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(change), query, dk, input_precision=PRECISION)
        if dq is not None or dy is not None:
            found = (tl.dot(change, key_rows, input_precision=PRECISION) * scale).to(dtype)
            if dq is not None:
                store_tile(dq + (token * HEADS + head) * KEY_DIM, found, HEADS * KEY_DIM, left, KEY_DIM)
            if dy is not None:
                for start in range(0, C, BLOCK_C):
                    weight = load_tile(query_weight, C, 0, KEY_DIM, start, C, BLOCK_K, BLOCK_C)
                    rows = tl.dot(found, weight, input_precision=PRECISION)
                    store_tile(dy + token * C + start, rows, C, left, C - start)
    if dkeys_values is not None:
        dkeys_values += (part * images + image) * keys * KV_ROW
        store_tile(dkeys_values + head * KEY_DIM, dk * scale, KV_ROW, keys, KEY_DIM)
        store_tile(dkeys_values + HEADS * KEY_DIM + head * VALUE_DIM, dv, KV_ROW, keys, VALUE_DIM)


@triton.jit
def _normal_rows(
    x, weight, bias, rows, eps, C: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """LayerNorm with its affine of the first rows of x, or (not NORM) they themselves: (BLOCK_N, BLOCK_C) float32, columns beyond C 0."""
    wide = load_tile(x, C, 0, rows, 0, C, BLOCK_N, BLOCK_C).to(tl.float32)
    if NORM:
        c = tl.arange(0, BLOCK_C)[None, :]
        wide = affine(normalise_rows(wide, c < C, C, eps, C < BLOCK_C), weight, bias, c, C)
    return wide


@triton.jit
def _vector(x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(1, BLOCK) float32, 0 beyond SIZE."""
    i = tl.arange(0, BLOCK)[None, :]
    return tl.load(x + i, i < SIZE, 0.0).to(tl.float32)
