"""The steps of a packed model on a GPU: Triton kernels where there are some that can run a call, plain PyTorch elsewhere.

The keys and values stay with PyTorch: one matrix product of widths that are padded to whole vectors, with nothing before or after
it to fuse, is what cuBLAS does best.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmt_fast.backend import select
from cmt_fast.inference import program, torch_steps
from cmt_fast.inference.program import PackedModel, align_rows
from cmt_fast.inference.torch_steps import StepFunctions
from cmt_fast.ops.head.reasons import head_reasons
from cmt_fast.ops.head.schema import head_features_triton, head_linear_triton
from cmt_fast.ops.irffn.reasons import depthwise_project_reasons, expand_reasons
from cmt_fast.ops.irffn.schema import depthwise_project_triton, expand_triton
from cmt_fast.ops.layout import nchw
from cmt_fast.ops.lmhsa.reasons import absorbed_attention_reasons, projected_attention_reasons
from cmt_fast.ops.lmhsa.schema import absorbed_attention_triton, projected_attention_triton
from cmt_fast.ops.lpu.reasons import lpu_reduce_reasons
from cmt_fast.ops.lpu.schema import lpu_reduce_triton
from cmt_fast.ops.patch_embed.reasons import patch_embed_reasons
from cmt_fast.ops.patch_embed.schema import patch_embed_triton
from cmt_fast.ops.stem.reasons import stem_embed_reasons, stem_reasons
from cmt_fast.ops.stem.schema import stem_embed_triton, stem_triton


def stem(step: program.Stem, x: Tensor) -> Tensor:
    """(B, in_chans, H, W), any strides -> (B, ceil(H / 2), ceil(W / 2), S)."""
    parts = _convolutions(step)
    if _takes_triton("packed stem", x, lambda: stem_reasons(x, *parts)):
        return stem_triton(x, *itertools.chain(*parts))
    return torch_steps.stem(step, x)


def stem_embed(step: program.Stem, embed: program.PatchEmbed, x: Tensor) -> Tensor:
    """:func:`stem`, then :func:`patch_embed`: (B, in_chans, H, W), any strides -> (B, ceil(H / 2) // 2, ceil(W / 2) // 2, C)."""
    embedding = (embed.weight, embed.bias, embed.scale, embed.shift)
    parts = (*_convolutions(step), embedding)
    if _takes_triton("packed stem_embed", x, lambda: stem_embed_reasons(x, *parts)):
        return stem_embed_triton(x, *itertools.chain(*parts), embed.channels, embed.eps)
    return torch_steps.patch_embed(embed, torch_steps.stem(step, x))


def patch_embed(step: program.PatchEmbed, x: Tensor) -> Tensor:
    """(B, H, W, C_in) -> (B, H // 2, W // 2, C)."""
    parameters = (step.weight, step.bias, step.scale, step.shift)
    if _takes_triton("packed patch_embed", x, lambda: patch_embed_reasons(x, *parameters)):
        return patch_embed_triton(x, *parameters, step.channels, step.eps)
    return torch_steps.patch_embed(step, x)


def lpu(step: program.LPU, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, C) -> the same shape, and its reduction (B, H // k, W // k, C)."""
    parameters = (step.taps, step.bias, step.reduction)
    if _takes_triton("packed lpu", x, lambda: lpu_reduce_reasons(x, *parameters, step.reduce)):
        return lpu_reduce_triton(x, *parameters, step.reduce, step.channels, step.eps)
    return torch_steps.lpu(step, x)


def attention(step: program.Attention, kv_step: program.KV, y: Tensor, keys_values: Tensor, table: Tensor) -> Tensor:
    """y (B, H, W, C), keys_values (B, M, rows), table (h, N, M) -> (B, H, W, C)."""
    query_weight, query_bias, out_weight = step.query_weight, step.query_bias, step.out_weight
    numbers = (step.base2, step.channels, step.eps)
    if query_weight is None or query_bias is None or out_weight is None:
        absorbed = (y, keys_values, table, step.out_bias)
        if _takes_triton("packed attention, absorbed", y, lambda: absorbed_attention_reasons(*absorbed)):
            return absorbed_attention_triton(*absorbed, *numbers)
    else:
        projected = (y, query_weight, query_bias, keys_values, table, out_weight, step.out_bias)
        if _takes_triton("packed attention", y, lambda: projected_attention_reasons(*projected)):
            return projected_attention_triton(*projected, *numbers)
    return torch_steps.attention(step, kv_step, y, keys_values, table)


def head(step: program.Head, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, classes), or the features before the classifier, (B, features) or (B, features, H, W)."""
    weights = (step.weight, step.hidden_weight, step.class_weight)
    biases = (step.bias, step.hidden_bias, step.class_bias)
    if not _takes_triton("packed head", x, lambda: head_reasons(x, weights, biases)):
        return torch_steps.head(step, x)
    # Rows of the last weight beyond `features` are padding, and left out.
    last = None if step.class_weight is not None else step.features
    rows = last if step.hidden_weight is None else None
    x = head_features_triton(x, step.weight[:rows], step.bias[:rows], step.pool)
    if step.hidden_weight is not None and step.hidden_bias is not None:
        x = torch.tanh(head_linear_triton(x, step.hidden_weight[:last], step.hidden_bias[:last]))
    if step.class_weight is not None and step.class_bias is not None:
        return head_linear_triton(x, step.class_weight, step.class_bias)
    return x if step.pool else nchw(x)


def expand(step: program.Expand, z: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, R)."""
    tensors = (z, step.weight, step.bias, step.scale, step.shift)
    if _takes_triton("packed expand", z, lambda: expand_reasons(*tensors)):
        return expand_triton(*tensors, step.channels, step.eps)
    return torch_steps.expand(step, z)


def depthwise_project(step: program.DepthwiseProject, hidden: Tensor, z: Tensor) -> Tensor:
    """hidden (B, H, W, R), z (B, H, W, C) the block's shortcut -> (B, H, W, C)."""
    tensors = (hidden, step.taps, step.bias, step.weight, step.out_bias, z)
    if _takes_triton("packed depthwise_project", hidden, lambda: depthwise_project_reasons(*tensors)):
        return depthwise_project_triton(*tensors)
    return torch_steps.depthwise_project(step, hidden, z)


#: The best function for each step. ``use_backend("triton")`` insists on kernels, ``use_backend("reference")`` on plain PyTorch.
TRITON = StepFunctions(
    stem=stem,
    stem_embed=stem_embed,
    patch_embed=patch_embed,
    lpu=lpu,
    attention=attention,
    expand=expand,
    depthwise_project=depthwise_project,
    head=head,
)


def prepare(packed: PackedModel) -> tuple[PackedModel, StepFunctions]:
    """The program with its tables laid out for kernels, and the functions to run it with, whatever the process-wide setting is."""
    return align_tables(packed), choosing("auto")


def align_tables(packed: PackedModel) -> PackedModel:
    """The same program, the rows of its position bias tables a multiple of 16 elements apart (:func:`align_rows`)."""
    stages = tuple(dataclasses.replace(stage, table=align_rows(stage.table)) for stage in packed.stages)
    return dataclasses.replace(packed, stages=stages)


class _Wanted(threading.local):
    """The backend that steps of this thread ask for; None for the process-wide setting."""

    backend: str | None = None


_wanted = _Wanted()


def choosing(backend: str) -> StepFunctions:
    """:data:`TRITON`, asking for ``backend`` whatever the process-wide setting is."""
    steps = [f.name for f in dataclasses.fields(StepFunctions) if getattr(TRITON, f.name) is not None]
    return StepFunctions(**{step: partial(_ask, backend, step) for step in steps})


def _ask(backend: str, step: str, *arguments: Any) -> Any:
    _wanted.backend = backend
    try:
        return getattr(TRITON, step)(*arguments)
    finally:
        _wanted.backend = None


def _convolutions(step: program.Stem) -> tuple[tuple[Tensor, ...], ...]:
    """Of each convolution the weight, then the bias and, if there is one, the affine."""
    return (
        (step.weight1, step.bias1, step.scale1, step.shift1),
        (step.weight2, step.bias2, step.scale2, step.shift2),
        (step.weight3, step.bias3),
    )


def _takes_triton(step: str, x: Tensor, reasons: Callable[[], list[str]]) -> bool:
    return select(step, {"triton": reasons}, _wanted.backend, device=x.device) == "triton"
