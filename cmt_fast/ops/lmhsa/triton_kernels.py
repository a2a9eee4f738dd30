"""The attention sub-layer of a packed model on a GPU."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.attend import attend
from cmt_fast.ops._triton.linear import normal_rows
from cmt_fast.ops._triton.tiles import load_tile


@triton.jit
def absorbed_attention_kernel(
    x,
    keys_values,
    table,
    out_bias,
    out,
    images,
    tokens,
    keys,
    table_head,
    table_row,
    table_columns,
    eps,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    KV_ROW: tl.constexpr,
    BASE2: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x + sum over heads of softmax(LN(x) G_h^T + key bias_h + table_h) V'_h, + out_bias.

    A program does a tile of tokens of one image. Images vary fastest: a tile of the table, which they share, stays in the cache.

    Args:
        x, out: (images, tokens, C).
        keys_values: (images, keys, KV_ROW): HEADS times C channels of G, as many of V', one key bias a head.
        table: (HEADS, tokens, keys), heads table_head and rows table_row apart, of which table_columns >= keys columns may be read.
        out_bias: (C,).
        CHANNELS: how many of C are not padding.
    """
    image = (tl.program_id(0) % images).to(tl.int64)
    first = (tl.program_id(0) // images).to(tl.int64) * BLOCK_N
    queries = tokens - first
    x += (image * tokens + first) * C
    out += (image * tokens + first) * C
    table += first * table_row
    keys_values += image * keys * KV_ROW
    normal = normal_rows(x, queries, eps, C, CHANNELS, BLOCK_N, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for head in range(HEADS):
        values, _ = attend(
            normal,
            keys_values + head * C,
            keys_values + (HEADS + head) * C,
            keys_values + 2 * HEADS * C + head,
            table,
            KV_ROW,
            KV_ROW,
            KV_ROW,
            table_row,
            table_columns,
            queries,
            keys,
            1.0,
            C,
            C,
            BASE2,
            ONE_TILE,
            BLOCK_M,
            BLOCK_C,
            BLOCK_C,
            PRECISION,
        )
        total += values
        table += table_head
    _store_with_shortcut(out, x, total, out_bias, queries, C, BLOCK_N, BLOCK_C)


@triton.jit
def projected_attention_kernel(
    x,
    query_weight,
    query_bias,
    keys_values,
    table,
    out_weight,
    out_bias,
    out,
    images,
    tokens,
    keys,
    table_head,
    table_row,
    table_columns,
    eps,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BASE2: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x + sum over heads of softmax(q_h k_h^T + table_h) v_h Wo_h^T, + out_bias, where q_h = LN(x) Wq_h^T + bq_h.

    Programs as in :func:`absorbed_attention_kernel`.

    Args:
        x, out: (images, tokens, C).
        query_weight: (HEADS * KEY_DIM, C); query_bias: (HEADS * KEY_DIM,).
        keys_values: (images, keys, HEADS * (KEY_DIM + VALUE_DIM)).
        table: (HEADS, tokens, keys), heads table_head and rows table_row apart, of which table_columns >= keys columns may be read.
        out_weight: (C, HEADS * VALUE_DIM); out_bias: (C,).
        CHANNELS: how many of C are not padding.
    """
    KV_ROW: tl.constexpr = HEADS * (KEY_DIM + VALUE_DIM)
    image = (tl.program_id(0) % images).to(tl.int64)
    first = (tl.program_id(0) // images).to(tl.int64) * BLOCK_N
    queries = tokens - first
    x += (image * tokens + first) * C
    out += (image * tokens + first) * C
    table += first * table_row
    keys_values += image * keys * KV_ROW
    normal = normal_rows(x, queries, eps, C, CHANNELS, BLOCK_N, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for head in range(HEADS):
        weight = load_tile(query_weight + head * KEY_DIM * C, C, 0, KEY_DIM, 0, C, BLOCK_K, BLOCK_C)
        dim = tl.arange(0, BLOCK_K)[None, :]
        query = tl.dot(normal, tl.trans(weight), input_precision=PRECISION)
        query += tl.load(query_bias + head * KEY_DIM + dim, dim < KEY_DIM, 0.0)
        values, _ = attend(
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
            queries,
            keys,
            1.0,
            KEY_DIM,
            VALUE_DIM,
            BASE2,
            ONE_TILE,
            BLOCK_M,
            BLOCK_K,
            BLOCK_V,
            PRECISION,
        )
        weight = load_tile(out_weight + head * VALUE_DIM, HEADS * VALUE_DIM, 0, C, 0, VALUE_DIM, BLOCK_C, BLOCK_V)
        total = tl.dot(values.to(normal.dtype), tl.trans(weight), total, input_precision=PRECISION)
        table += table_head
    _store_with_shortcut(out, x, total, out_bias, queries, C, BLOCK_N, BLOCK_C)


@triton.jit
def _store_with_shortcut(out, x, branch, bias, rows, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = x + branch + bias. x is read again, from the cache: holding it would take registers from the products."""
    row, c = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (c < C)
    branch += tl.load(bias + c, c < C, 0.0)
    branch += tl.load(x + row * C + c, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(out + row * C + c, branch.to(out.dtype.element_ty), inside)
