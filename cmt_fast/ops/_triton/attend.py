"""Attention of a tile of queries over all keys of one image and head: the formulas that every attention kernel shares."""

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
        (rows, BLOCK_V) float32, 0 beyond VALUE_DIM; and (rows,) float32, the logarithm of the sum of the exponentials of a row's logits, which
        training keeps (the compiler drops it where nobody reads it).
    """
    UNIT: tl.constexpr = 1.0 if BASE2 else 1.4426950408889634  # log2(e)
    if ONE_TILE:
        key_rows = load_tile(k, k_row, 0, keys, 0, KEY_DIM, BLOCK_M, BLOCK_K)
        logits = logits_of(
            q, key_rows, key_bias, bias, key_bias_row, bias_row, bias_columns, queries, keys, scale, 0, PRECISION
        )
        peak = tl.max(logits, 1)
        weights = tl.exp2((logits - peak[:, None]) * UNIT)
        total = tl.sum(weights, 1)
        weights *= (1.0 / total)[:, None]
        values = load_tile(v, v_row, 0, keys, 0, VALUE_DIM, BLOCK_M, BLOCK_V)
        return tl.dot(weights.to(q.dtype), values, input_precision=PRECISION), peak + tl.log2(total) / UNIT
    peak = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    out = tl.zeros([q.shape[0], BLOCK_V], tl.float32)
    for start in range(0, keys, BLOCK_M):
        key_rows = load_tile(k, k_row, start, keys, 0, KEY_DIM, BLOCK_M, BLOCK_K)
        logits = logits_of(
            q, key_rows, key_bias, bias, key_bias_row, bias_row, bias_columns, queries, keys, scale, start, PRECISION
        )
        old, peak = peak, tl.maximum(peak, tl.max(logits, 1))
        origin = tl.where(peak == float("-inf"), 0.0, peak)  # as long as a bias of -inf has left out every key
        shrink = tl.exp2((old - origin) * UNIT)
        weights = tl.exp2((logits - origin[:, None]) * UNIT)
        total = total * shrink + tl.sum(weights, 1)
        values = load_tile(v, v_row, start, keys, 0, VALUE_DIM, BLOCK_M, BLOCK_V)
        out = tl.dot(weights.to(q.dtype), values, out * shrink[:, None], input_precision=PRECISION)
    return out * (1.0 / total)[:, None], peak + tl.log2(total) / UNIT


@triton.jit
def logits_of(
    q,
    key_rows,
    key_bias,
    bias,
    key_bias_row,
    bias_row,
    bias_columns,
    queries,
    keys,
    scale,
    start,
    PRECISION: tl.constexpr,
):
    """Those of the keys from ``start`` on, -inf beyond the last key: (rows of q, rows of key_rows) float32.

    Args:
        key_rows: (rows, BLOCK_K), the keys from ``start`` on, 0 beyond the last.
        others: as of :func:`attend`.
    """
    key = start + tl.arange(0, key_rows.shape[0])[None, :]
    logits = tl.dot(q, tl.trans(key_rows), input_precision=PRECISION) * scale
    if key_bias is not None:
        logits += tl.load(key_bias + key * key_bias_row, key < keys, 0.0).to(tl.float32)
    if bias is not None:
        row = tl.arange(0, q.shape[0])[:, None]
        logits += tl.load(bias + row.to(tl.int64) * bias_row + key, (row < queries) & (key < bias_columns), 0.0).to(
            tl.float32
        )
    return tl.where(key < keys, logits, float("-inf"))


@triton.jit
def attend_backward(
    q,
    g,
    key_rows,
    value_rows,
    bias,
    lse,
    delta,
    bias_row,
    bias_columns,
    queries,
    keys,
    scale,
    start,
    PRECISION: tl.constexpr,
):
    """The weights of a tile of queries and keys, made again from the log-sum-exps, and the gradient of their logits.

    Args:
        g: (rows, BLOCK_V), the gradient of the output, 0 beyond the last query; q: (rows, BLOCK_K).
        key_rows: (BLOCK_M, BLOCK_K), the keys from ``start`` on; value_rows: (BLOCK_M, BLOCK_V); 0 beyond the last.
        bias: pointer to (queries, keys), or None.
        lse: pointer to (queries,) float32.
        delta: (rows,) float32, sum_m P_nm dP_nm; or None where the tile has all keys: it is summed here, of what is in registers.
        others: as of :func:`attend`.

    Returns:
        P and dS, (rows, BLOCK_M) in the dtype of q; 0 beyond the last query and key.
    """
    logits = logits_of(q, key_rows, None, bias, 0, bias_row, bias_columns, queries, keys, scale, start, PRECISION)
    row = tl.arange(0, q.shape[0])
    level = tl.load(lse + row, row < queries, float("inf"))  # beyond the last query, P = 0
    weights = tl.exp2((logits - level[:, None]) * 1.4426950408889634)  # log2(e)
    dweights = tl.dot(g, tl.trans(value_rows), input_precision=PRECISION)
    if delta is None:
        total = tl.sum(
            weights, 1
        )  # 1, but for what the logits were rounded otherwise in the forward pass; of one key dS must be 0
        weights *= (1.0 / tl.where(total > 0, total, 1.0))[:, None]
        delta = tl.sum(weights * dweights, 1)
    return weights.to(q.dtype), (weights * (dweights - delta[:, None])).to(q.dtype)
