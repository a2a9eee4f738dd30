"""Attention of a tile of queries over all keys of one image and head: the formula that every attention kernel shares."""

import triton
import triton.language as tl

from cmt_fast.ops._triton.tiles import load_tile


@triton.jit
def attend(
    q,
    k,
    v,
    key_bias,
    bias,
    k_row,
    v_row,
    key_bias_row,
    bias_row,
    bias_columns,
    queries,
    keys,
    scale,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BASE2: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """softmax(scale * q k^T + key_bias + bias) v.

    Args:
        q: (rows, BLOCK_K) in the dtype of the products, 0 beyond KEY_DIM.
        k, v: pointers to (keys, KEY_DIM) and (keys, VALUE_DIM), rows k_row and v_row apart, unit stride in a row.
        key_bias: pointer to (keys,), key_bias_row apart, or None.
        bias: pointer to (queries, keys), rows bias_row apart, of which bias_columns >= keys columns may be read; or None.
        queries: how many rows of q are inside the map.
        BASE2: the logits are exponents of 2, not of e.
        ONE_TILE: keys <= BLOCK_M. Otherwise the keys stream through in tiles, and the sums so far are rescaled when the largest logit grows.
        PRECISION: of float32 products, "ieee" or "tf32".

    Returns:
        (rows, BLOCK_V) float32, 0 beyond VALUE_DIM.
    """
    UNIT: tl.constexpr = 1.0 if BASE2 else 1.4426950408889634  # log2(e)
    if ONE_TILE:
        logits = _logits(
            q,
            k,
            key_bias,
            bias,
            k_row,
            key_bias_row,
            bias_row,
            bias_columns,
            queries,
            keys,
            scale,
            0,
            KEY_DIM,
            BLOCK_M,
            BLOCK_K,
            PRECISION,
        )
        weights = tl.exp2((logits - tl.max(logits, 1)[:, None]) * UNIT)
        weights *= (1.0 / tl.sum(weights, 1))[:, None]
        values = load_tile(v, v_row, 0, keys, 0, VALUE_DIM, BLOCK_M, BLOCK_V)
        return tl.dot(weights.to(q.dtype), values, input_precision=PRECISION)
    peak = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    out = tl.zeros([q.shape[0], BLOCK_V], tl.float32)
    for start in range(0, keys, BLOCK_M):
        logits = _logits(
            q,
            k,
            key_bias,
            bias,
            k_row,
            key_bias_row,
            bias_row,
            bias_columns,
            queries,
            keys,
            scale,
            start,
            KEY_DIM,
            BLOCK_M,
            BLOCK_K,
            PRECISION,
        )
        old, peak = peak, tl.maximum(peak, tl.max(logits, 1))
        origin = tl.where(peak == float("-inf"), 0.0, peak)  # as long as a bias of -inf has left out every key
        shrink = tl.exp2((old - origin) * UNIT)
        weights = tl.exp2((logits - origin[:, None]) * UNIT)
        total = total * shrink + tl.sum(weights, 1)
        values = load_tile(v, v_row, start, keys, 0, VALUE_DIM, BLOCK_M, BLOCK_V)
        out = tl.dot(weights.to(q.dtype), values, out * shrink[:, None], input_precision=PRECISION)
    return out * (1.0 / total)[:, None]


@triton.jit
def _logits(
    q,
    k,
    key_bias,
    bias,
    k_row,
    key_bias_row,
    bias_row,
    bias_columns,
    queries,
    keys,
    scale,
    start,
    KEY_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Those of the keys from ``start`` on, -inf beyond the last key: (rows, BLOCK_M) float32."""
    key = start + tl.arange(0, BLOCK_M)[None, :]
    key_rows = load_tile(k, k_row, start, keys, 0, KEY_DIM, BLOCK_M, BLOCK_K)
    logits = tl.dot(q, tl.trans(key_rows), input_precision=PRECISION) * scale
    if key_bias is not None:
        logits += tl.load(key_bias + key * key_bias_row, key < keys, 0.0).to(tl.float32)
    if bias is not None:
        row = tl.arange(0, q.shape[0])[:, None]
        logits += tl.load(bias + row.to(tl.int64) * bias_row + key, (row < queries) & (key < bias_columns), 0.0).to(
            tl.float32
        )
    return tl.where(key < keys, logits, float("-inf"))
