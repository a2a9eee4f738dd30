"""The launches of each kernel in each stage of a packed model, or of one in training, from tensors without memory. A new kernel is one line in ``LAUNCHES``.

The stem stands in stage a, before which it runs, and the head in stage d.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.irffn_launches import irffn_output_lpu, irffn_train
from cmt_fast.inference.program import Padding, round_up
from cmt_fast.ops._triton.device import DeviceLimits
from cmt_fast.ops._triton.launch import Launch
from cmt_fast.ops._triton.linear_launch import linear_launch
from cmt_fast.ops._triton.statistics import (
    GROUP,
    add_partials_launches,
    gradient_sums_launch,
    merge_launch,
    statistics_launch,
)
from cmt_fast.ops._triton.table import aligned
from cmt_fast.ops.activated_conv import triton_train_launch as activated_conv
from cmt_fast.ops.attention.triton_launch import attention_launch
from cmt_fast.ops.attention.triton_train_launch import backward_launches
from cmt_fast.ops.depthwise.triton_launch import conv3x3_launch, reduce_launch
from cmt_fast.ops.depthwise.triton_train_launch import conv3x3_backward_launch, reduce_backward_launch
from cmt_fast.ops.head.triton_launch import features_launch
from cmt_fast.ops.irffn.triton_launch import depthwise_project_launches, expand_launch
from cmt_fast.ops.lmhsa.reduce_configs import reduce_config, window_count
from cmt_fast.ops.lmhsa.triton_launch import absorbed_launch, projected_launch
from cmt_fast.ops.lmhsa.triton_reduce_launch import (
    norm_reduce_backward_launch,
    norm_reduce_launch,
    normalise_launch,
)
from cmt_fast.ops.lmhsa.triton_train_launch import (
    Core,
    Gradients,
    core_backward_launches,
    core_forward_launch,
    layer_norm_launch,
)
from cmt_fast.ops.lpu.triton_launch import lpu_reduce_launch
from cmt_fast.ops.patch_embed.triton_launch import patch_embed_launch
from cmt_fast.ops.stem.triton_launch import conv_embed_launch, conv_launch
from cmt_fast.testing.shapes import StageShape

#: A stage (with its batch), the dtype of the stream, and the device to choose tiles for.
MakeLaunches = Callable[[StageShape, torch.dtype, DeviceLimits], list[Launch]]

_PAD = Padding()
_vector = partial(torch.empty, device="meta", dtype=torch.float32)


def lpu(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    c, k = round_up(shape.dim, _PAD.channels), shape.sr_ratio
    x = torch.empty(shape.batch, shape.height, shape.width, c, dtype=dtype, device="meta")
    reduced = x.new_empty(shape.batch, shape.height // k, shape.width // k, c)
    reduction = _vector(k * k, c) if k > 1 else None
    return [lpu_reduce_launch(x, _vector(9, c), _vector(c), reduction, x, reduced, k, shape.dim, 1e-6, limits)]


def attention(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """Absorbed in stages a and b, as ``pack`` does; after them fused, or the three launches of the split form."""
    (b, n, m), h, c = (shape.batch, shape.queries, shape.keys), shape.heads, round_up(shape.dim, _PAD.channels)
    matrix = partial(torch.empty, device="meta", dtype=dtype)
    x, bias, norm = matrix(b, n, c), _vector(c), (shape.dim, 1e-6, limits)
    table = matrix(h, n, round_up(m, 16))[..., :m]  # as align_tables makes it
    if shape.name[-1] in "ab":
        keys_values = matrix(b, m, 2 * h * c + round_up(h, _PAD.channels))
        return [absorbed_launch(x, keys_values, table, bias, x, True, *norm)]
    d, dv = round_up(shape.qk_head_dim, _PAD.head), round_up(shape.v_head_dim, _PAD.head)
    query_weight, query_bias, out_weight = matrix(h * d, c), _vector(h * d), matrix(c, h * dv)
    keys_values = matrix(b, m, h * (d + dv))
    fused = projected_launch(x, query_weight, query_bias, keys_values, table, out_weight, bias, x, True, *norm)
    if fused is not None:
        return [fused]
    query, attended = matrix(b, n, h * d), matrix(b, n, h, dv)
    parts = (query, *keys_values.split([h * d, h * dv], -1))
    q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in parts)
    return [
        linear_launch(x, query_weight, query_bias, None, query, *norm),
        attention_launch(q, k, v, table, attended, None, 1.0, True, limits),
        linear_launch(attended, out_weight, bias, x, x, None, 0.0, limits),
    ]


def stem(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """Two convolutions, and the third with the patch embedding of stage a: one launch, or two where that is better."""
    if shape.name[-1] != "a":
        return []
    s, c = (round_up(width, _PAD.channels) for width in (shape.in_dim, shape.dim))
    matrix = partial(torch.empty, device="meta", dtype=dtype)
    image, vectors = matrix(shape.batch, 3, 4 * shape.height, 4 * shape.width), [_vector(s) for _ in range(3)]
    map_, tokens = (matrix(shape.batch, n * shape.height, n * shape.width, width) for n, width in ((2, s), (1, c)))
    x, weight, bias = map_.permute(0, 3, 1, 2), matrix(s, 3, 3, s), vectors[0]
    launches = [
        conv_launch(image, matrix(s, 3, 3, 3), *vectors, map_, 2, limits),
        conv_launch(x, weight, *vectors, map_, 1, limits),
    ]
    embedding = [matrix(c, 4 * s), *(_vector(c) for _ in range(3))]
    fused = conv_embed_launch(map_, weight, bias, *embedding, tokens, shape.dim, 1e-5, limits)
    if fused is not None:
        return [*launches, fused]
    launches.append(conv_launch(x, weight, bias, None, None, map_, 1, limits))
    return [*launches, patch_embed_launch(map_, *embedding, tokens, shape.dim, 1e-5, limits)]


def patch_embed(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """That of stage a belongs to the stem."""
    if shape.name[-1] == "a":
        return []
    c_in, c = (round_up(width, _PAD.channels) for width in (shape.in_dim, shape.dim))
    matrix = partial(torch.empty, device="meta", dtype=dtype)
    x, y = (matrix(shape.batch, n * shape.height, n * shape.width, width) for n, width in ((2, c_in), (1, c)))
    vectors = [_vector(c) for _ in range(3)]
    return [patch_embed_launch(x, matrix(c, 4 * c_in), *vectors, y, shape.dim, 1e-5, limits)]


def head(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    if shape.name[-1] != "d":
        return []
    c, matrix = round_up(shape.dim, _PAD.channels), partial(torch.empty, device="meta", dtype=dtype)
    x, features = matrix(shape.batch, shape.height, shape.width, c), matrix(shape.batch, 1280)
    return [
        features_launch(x, matrix(1280, c), _vector(1280), features, limits),
        linear_launch(features, matrix(1000, 1280), _vector(1000), None, matrix(shape.batch, 1000), None, 0.0, limits),
    ]


def stem_train(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """What lies between two convolutions of the stem in a step of training: two launches forward, two backward."""
    if shape.name[-1] != "a":
        return []
    x, n = (
        torch.empty(shape.batch, 2 * shape.height, 2 * shape.width, shape.in_dim, dtype=dtype, device="meta"),
        _vector(6, shape.in_dim),
    )
    partials = activated_conv.new_partials(x)
    return [
        activated_conv.moments_launch(x, partials, _vector(len(partials))),
        activated_conv.norm_launch(x, n, None, x, None),
        activated_conv.norm_launch(x, n, x, x, partials),
        activated_conv.gradient_launch(x, x, n, _vector(2, shape.in_dim), x),
    ]


def patch_norm(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """LayerNorm after the patch embedding in training, forward and backward: windows of one token."""
    x, c = torch.empty(shape.batch, shape.height, shape.width, shape.dim, dtype=dtype, device="meta"), shape.dim
    programs = reduce_config(window_count(x.shape, 1), c).programs
    norm = (_vector(c), _vector(c), 1e-5)
    return [
        norm_reduce_launch(x, *norm, None, None, 1, x, None, None),
        norm_reduce_backward_launch(
            x, None, x, None, None, None, None, *norm, None, 1, x, _vector(programs, 2, c), None
        ),
    ]


def conv3x3(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """The convolution of a local perception unit in training; the gradient of its map alone is the same with the taps turned."""
    x, weight, bias = _convolution(shape, dtype, 3)
    return [conv3x3_launch(x, weight, bias, x, True, False, limits)]


def conv3x3_backward(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """Every gradient of it; the partial sums are added up by a kernel of their own."""
    x, weight, _ = _convolution(shape, dtype, 3)
    return [conv3x3_backward_launch(x, x, weight, x, True, True, True)]


def reduce(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """The reduction in training, and its gradients. Stage d has none."""
    k = shape.sr_ratio
    if k == 1:
        return []
    x, weight, bias = _convolution(shape, dtype, k)
    y = x.new_empty(shape.batch, shape.height // k, shape.width // k, shape.dim)
    return [reduce_launch(x, weight, bias, y, limits), reduce_backward_launch(y, x, weight, x, True, True)]


def _convolution(shape: StageShape, dtype: torch.dtype, k: int) -> tuple[torch.Tensor, ...]:
    """Map, weight and bias of a depthwise convolution in training: not padded, the parameters float32."""
    x = torch.empty(shape.batch, shape.height, shape.width, shape.dim, dtype=dtype, device="meta")
    return x, _vector(shape.dim, 1, k, k), _vector(shape.dim)


def expand(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    x, hidden, weight = _irffn(shape, dtype)
    bias, scale, shift = (_vector(hidden.shape[-1]) for _ in range(3))
    return [expand_launch(x, weight, bias, scale, shift, hidden, shape.dim, 1e-6, limits)]


def depthwise_project(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """One launch; two where the accumulators of one would not fit, and for float32."""
    x, hidden, weight = _irffn(shape, dtype)
    (r, c), parameters = weight.shape, (_vector(9, hidden.shape[-1]), _vector(hidden.shape[-1]))
    return depthwise_project_launches(hidden, *parameters, weight.new_empty(c, r), _vector(c), x, x, limits)


def _irffn(shape: StageShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, H, W, C), hidden (B, H, W, R), weight (R, C)."""
    c, r = round_up(shape.dim, _PAD.channels), round_up(shape.hidden, _PAD.hidden)
    x = torch.empty(shape.batch, shape.height, shape.width, c, dtype=dtype, device="meta")
    return x, x.new_empty(*x.shape[:-1], r), x.new_empty(r, c)


def attention_fwd(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """The primitive in training: q, k and v as linear layers make them, the bias table a float32 parameter."""
    q, k, v, table, out, lse = _attention_tensors(shape, dtype)
    return [attention_launch(q, k, v, aligned(table), out, lse, 1.0, False, limits)]


def attention_bwd(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """Its backward pass with every gradient."""
    q, k, v, table, out, lse = _attention_tensors(shape, dtype)
    dq, dk, dv = (torch.empty_like(t.transpose(1, 2)) for t in (q, k, v))
    grad = torch.empty_like(out).transpose(1, 2)
    return backward_launches(
        grad, q, k, v, aligned(table), lse, out.transpose(1, 2), dq, dk, dv, torch.empty_like(table), 1.0, limits
    )


def _attention_tensors(shape: StageShape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (b, n, m), h, d, dv = (shape.batch, shape.queries, shape.keys), shape.heads, shape.qk_head_dim, shape.v_head_dim
    matrix = partial(torch.empty, device="meta", dtype=dtype)
    keys_values = matrix(b, m, h * (d + dv)).split([h * d, h * dv], -1)
    q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in (matrix(b, n, h * d), *keys_values))
    return q, k, v, _vector(h, n, m), matrix(b, n, h, dv), _vector(b, h, n)


def lmhsa_core_fwd(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """The core of the sub-layer in training, the stream in the dtype of the products; where it is composed, what is its own: LayerNorm."""
    core, z, lse = _core_tensors(shape, dtype)
    fused = core_forward_launch(core, _vector(shape.dim), z, lse, True, limits)
    return [layer_norm_launch(core, z) if fused is None else fused]


def lmhsa_core_bwd(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """Its backward pass with every gradient; of several heads without the product dy = dq Wq."""
    core, z, lse = _core_tensors(shape, dtype)
    products = (core.x, core.keys_values, core.table, core.query_weight, _vector(len(core.query_weight)))
    wanted = Gradients(*products, core.out_weight, _vector(shape.dim))
    fused = core_backward_launches(core, z, lse, wanted, limits)
    return [layer_norm_launch(core, z)] if fused is None else fused[0]


def _core_tensors(shape: StageShape, dtype: torch.dtype) -> tuple[Core, Tensor, Tensor]:
    (b, n, m), h, c = (shape.batch, shape.queries, shape.keys), shape.heads, shape.dim
    d, dv = h * shape.qk_head_dim, h * shape.v_head_dim
    matrix = partial(torch.empty, device="meta", dtype=dtype)
    core = Core(
        x=matrix(b, n, c),
        norm_weight=_vector(c),
        norm_bias=_vector(c),
        eps=1e-6,
        query_weight=matrix(d, c),
        query_bias=_vector(d),
        keys_values=matrix(b, m, d + dv),
        table=_vector(h, n, m),
        out_weight=matrix(c, dv),
        row_scale=_vector(b),
        scale=1.0,
    )
    return core, torch.empty_like(core.x), _vector(b, h, n)


def lmhsa_reduce_fwd(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """From the stream to what keys and values are products of: LayerNorm and reduction, then BatchNorm; in stage d LayerNorm alone."""
    x, reduced, c, k = *_maps(shape, dtype), shape.dim, shape.sr_ratio
    norm = (_vector(c), _vector(c), 1e-6)
    if k == 1:
        return [norm_reduce_launch(x, *norm, None, None, k, reduced, None, None)]
    programs = reduce_config(reduced.numel() // c, c).programs
    moments = _vector(programs, 2, c), _vector(programs)
    return [
        norm_reduce_launch(x, *norm, _vector(k * k, c), _vector(c), k, reduced, *moments),
        normalise_launch(reduced, _vector(6, c), reduced),
    ]


def lmhsa_reduce_bwd(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """From the gradients by way of the queries and of keys and values to that of the stream, with those of all parameters on the way."""
    x, reduced, c, k = *_maps(shape, dtype), shape.dim, shape.sr_ratio
    programs = reduce_config(window_count(x.shape, k), c).programs
    norm, norm_partials = (_vector(c), _vector(c), 1e-6), _vector(programs, 2, c)
    if k == 1:
        arguments = (x, x, x, reduced, None, None, None, *norm, None, k, x, norm_partials, None)
        return [norm_reduce_backward_launch(*arguments)]
    batch_norm, tap_partials = (reduced, _vector(6, c), _vector(2, c)), _vector(programs, k * k + 1, c)
    arguments = (x, x, x, reduced, *batch_norm, *norm, _vector(k * k, c), k, x, norm_partials, tap_partials)
    return [
        normalise_launch(reduced, _vector(6, c), reduced),  # again, for the gradients of the weights of keys and values
        gradient_sums_launch(reduced, reduced, _vector(6, c)),
        norm_reduce_backward_launch(*arguments),
    ]


def lmhsa_merges(shape: StageShape, dtype: torch.dtype, limits: DeviceLimits) -> list[Launch]:
    """What merges the partial sums of the two before, small beside them."""
    c = shape.dim
    forward = lmhsa_reduce_fwd(shape, dtype, limits)[0].arguments
    partials, counts = forward["partials"], forward["counts"]
    launches = []
    if isinstance(partials, Tensor) and isinstance(counts, Tensor):
        if len(partials) > GROUP:
            merged = [_vector(-(-len(t) // GROUP), *t.shape[1:]) for t in (partials, counts)]
            launches.append(merge_launch(partials, counts, *merged))
            partials, counts = merged
        launches.append(statistics_launch(partials, counts, _vector(c), _vector(c), 1e-5, _vector(6, c)))
    for launch in lmhsa_reduce_bwd(shape, dtype, limits):
        found = (launch.arguments.get(name) for name in ("partials", "norm_partials", "tap_partials"))
        launches += [added for t in found if isinstance(t, Tensor) for added in add_partials_launches(t)]
    return launches


def _maps(shape: StageShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A map and its reduction."""
    x = torch.empty(shape.batch, shape.height, shape.width, shape.dim, dtype=dtype, device="meta")
    return x, x.new_empty(shape.batch, shape.height // shape.sr_ratio, shape.width // shape.sr_ratio, shape.dim)


def _in_stage_a(make: MakeLaunches) -> MakeLaunches:
    """For kernels that are the same in all stages."""
    return lambda shape, dtype, limits: make(shape, dtype, limits) if shape.name[-1] == "a" else []


LAUNCHES: dict[str, MakeLaunches] = {
    "stem": stem,
    "patch_embed": patch_embed,
    "lpu": lpu,
    "attention": attention,
    "stem_train": stem_train,
    "patch_norm": patch_norm,
    "depthwise_conv3x3": conv3x3,
    "depthwise_conv3x3_backward": conv3x3_backward,
    "depthwise_reduce": reduce,
    "head": head,
    "expand": expand,
    "depthwise_project": depthwise_project,
    "attention_fwd": attention_fwd,
    "attention_bwd": attention_bwd,
    "lmhsa_core_fwd": lmhsa_core_fwd,
    "lmhsa_core_bwd": lmhsa_core_bwd,
    "lmhsa_reduce_fwd": lmhsa_reduce_fwd,
    "lmhsa_reduce_bwd": lmhsa_reduce_bwd,
    "lmhsa_merges": _in_stage_a(lmhsa_merges),
    "irffn_train": irffn_train,
    "irffn_output_lpu": irffn_output_lpu,
}
