"""Running a packed model: the order of its steps."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from cmt_fast.inference.program import PackedModel
from cmt_fast.inference.torch_steps import TORCH, StepFunctions
from cmt_fast.models.grids import stage_grids
from cmt_fast.ops.attention.relative_pos import resize_relative_pos
from cmt_fast.ops.checks import shape_of
from cmt_fast.ops.layout import nchw


def run(packed: PackedModel, x: Tensor, functions: StepFunctions = TORCH) -> Tensor | list[Tensor]:
    """What the packed model's ``forward`` returns in eval mode.

    Args:
        packed: from :func:`pack` or :func:`load_packed`.
        x: (B, in_chans, H, W), floating point, on the program's device; it is converted to the program's dtype. Any size
            that the model takes: the position bias is resized where it is not ``packed.img_size``.
        functions: how each step is computed.

    Returns:
        Of a packed :class:`cmt_fast.CMT` the class scores (B, num_classes), or the features before the classifier; of a
        packed :class:`cmt_fast.CMTFeatures` its list of (B, C, H / stride, W / stride) maps, channels_last in memory.

    Raises:
        ValueError, TypeError: on a wrong shape, size, device or dtype of ``x``.
    """
    _check_input(packed, x)
    wanted = packed.out_indices if packed.head is None else (len(packed.stages) - 1,)
    with torch.autocast(x.device.type, enabled=False):  # the program has its own dtypes
        maps = _maps(packed, x, functions, wanted)
        if packed.head is None:
            return [_public(packed, i, maps[i]) for i in wanted]
        return functions.head(packed.head, maps[wanted[0]])


def run_features(packed: PackedModel, x: Tensor, functions: StepFunctions = TORCH) -> Tensor:
    """The last stage's map, as ``forward_features`` of the packed model: (B, C, H / stride, W / stride).

    Arguments and errors are those of :func:`run`.
    """
    _check_input(packed, x)
    last = len(packed.stages) - 1
    with torch.autocast(x.device.type, enabled=False):
        return _public(packed, last, _maps(packed, x, functions, (last,))[last])


def _maps(packed: PackedModel, x: Tensor, functions: StepFunctions, wanted: Collection[int]) -> dict[int, Tensor]:
    """The maps of the stages ``wanted``, (B, H, W, C) with their padding."""
    grids = stage_grids((x.shape[2], x.shape[3]), packed.sr_ratios)
    own_grids = stage_grids(packed.img_size, packed.sr_ratios)
    maps = {}
    x = functions.stem(packed.stem, x.to(packed.dtype))
    for i, (stage, grid, own) in enumerate(zip(packed.stages, grids, own_grids)):
        table = resize_relative_pos(stage.table, *own, *grid)
        x = functions.patch_embed(stage.patch_embed, x)
        for block in stage.blocks:
            y, reduced = functions.lpu(block.lpu, x)
            keys_values = functions.kv(block.kv, reduced)
            z = functions.attention(block.attention, block.kv, y, keys_values, table)
            x = functions.depthwise_project(block.depthwise_project, functions.expand(block.expand, z), z)
        if i in wanted:
            maps[i] = x
    return maps


def _public(packed: PackedModel, index: int, x: Tensor) -> Tensor:
    """A stage's map without its padding, (B, C, H, W) and channels_last."""
    return nchw(x[..., : packed.stages[index].patch_embed.channels].contiguous())


def _check_input(packed: PackedModel, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != packed.in_chans:
        hint = "; add the batch dimension with x.unsqueeze(0)" if isinstance(x, Tensor) and x.dim() == 3 else ""
        raise ValueError(f"the input must have shape (B, {packed.in_chans}, H, W), got {shape_of(x)}{hint}")
    if not x.is_floating_point():
        raise TypeError(f"the input must be floating point, got {x.dtype}: scale and normalise the image first")
    if x.device != packed.device:
        raise ValueError(f"the input is on {x.device} but the packed model is on {packed.device}; move the input")
