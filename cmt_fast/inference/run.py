"""Running a packed model: the order of its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from cmt_fast.inference.program import PackedModel, Stage, Stem, align_rows
from cmt_fast.inference.torch_steps import TORCH, StepFunctions
from cmt_fast.models.grids import stage_grids
from cmt_fast.ops.attention.relative_pos import resize_relative_pos
from cmt_fast.ops.checks import shape_of
from cmt_fast.ops.layout import nchw


def run(
    packed: PackedModel, x: Tensor, functions: StepFunctions = TORCH, *, chunk_bytes: int | None = None
) -> Tensor | list[Tensor]:
    """What the packed model's ``forward`` returns in eval mode.

    Args:
        packed: from :func:`pack` or :func:`load_packed`.
        x: (B, in_chans, H, W), floating point, on the program's device; it is converted to the program's dtype. Any size
            that the model takes: the position bias is resized where it is not ``packed.img_size``.
        functions: how each step is computed.
        chunk_bytes: take a batch through each stage in chunks of so many images that the widest map of a chunk, the hidden
            one of the IRFFN, has about this size and stays in a cache; at least one image. None: the whole batch at once.

    Returns:
        Of a packed :class:`cmt_fast.CMT` the class scores (B, num_classes), or the features before the classifier; of a
        packed :class:`cmt_fast.CMTFeatures` its list of (B, C, H / stride, W / stride) maps, channels_last in memory.

    Raises:
        ValueError, TypeError: on a wrong shape, size, device or dtype of ``x``.
    """
    if packed.head is None:
        return run_features(packed, x, packed.out_indices, functions, chunk_bytes=chunk_bytes)
    check_input(packed, x)
    last = len(packed.stages) - 1
    with _no_autocast(x.device):
        return functions.head(packed.head, _maps(packed, x, functions, (last,), chunk_bytes)[last])


def run_features(
    packed: PackedModel,
    x: Tensor,
    stages: Sequence[int] | None = None,
    functions: StepFunctions = TORCH,
    *,
    chunk_bytes: int | None = None,
) -> list[Tensor]:
    """The maps of ``stages`` (all by default), (B, C, H / stride, W / stride) each, channels_last in memory.

    No stage after the last one wanted runs. The other arguments and errors are those of :func:`run`.
    """
    check_input(packed, x)
    wanted = range(len(packed.stages)) if stages is None else stages
    with _no_autocast(x.device):
        maps = _maps(packed, x, functions, wanted, chunk_bytes)
        return [_public(packed, i, maps[i]) for i in wanted]


def _maps(
    packed: PackedModel, x: Tensor, functions: StepFunctions, wanted: Collection[int], chunk_bytes: int | None
) -> dict[int, Tensor]:
    """The maps of the stages ``wanted``, (B, H, W, C) with their padding."""
    grids = stage_grids((x.shape[2], x.shape[3]), packed.sr_ratios)
    own_grids = stage_grids(packed.img_size, packed.sr_ratios)
    maps = {}
    for i in range(max(wanted) + 1):
        stage, grid = packed.stages[i], grids[i]
        table = resize_relative_pos(stage.table, *own_grids[i], *grid)
        table = table.contiguous() if stage.table.is_contiguous() else align_rows(table)  # as the program's own
        stem = packed.stem if i == 0 else None
        if chunk_bytes is None:
            x = _stage(stem, stage, table, x, functions)
        else:
            hidden = grid.num_queries * len(stage.blocks[0].expand.bias) * packed.dtype.itemsize
            images = max(1, chunk_bytes // hidden)
            x = _in_chunks(lambda c: _stage(stem, stage, table, c, functions), x, images)  # noqa: B023 (called here)
        if i in wanted:
            maps[i] = x
    return maps


def _in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, images: int) -> Tensor:
    """``function`` of ``images`` images at a time, each result straight into its place."""
    if len(x) <= images:
        return function(x)
    first = function(x[:images])
    out = first.new_empty(len(x), *first.shape[1:])
    out[:images] = first
    for start in range(images, len(x), images):
        out[start : start + images] = function(x[start : start + images])
    return out


def _stage(stem: Stem | None, stage: Stage, table: Tensor, x: Tensor, functions: StepFunctions) -> Tensor:
    """One stage, the first with the stem before it."""
    if stem is None:
        x = functions.patch_embed(stage.patch_embed, x)
    elif functions.stem_embed is None:
        x = functions.patch_embed(stage.patch_embed, functions.stem(stem, x.to(stem.weight1.dtype)))
    else:
        x = functions.stem_embed(stem, stage.patch_embed, x.to(stem.weight1.dtype))
    for block in stage.blocks:
        y, reduced = functions.lpu(block.lpu, x)
        keys_values = functions.kv(block.kv, reduced)
        z = functions.attention(block.attention, block.kv, y, keys_values, table)
        x = functions.depthwise_project(block.depthwise_project, functions.expand(block.expand, z), z)
    return x


def _public(packed: PackedModel, index: int, x: Tensor) -> Tensor:
    """A stage's map without its padding, (B, C, H, W) and channels_last."""
    return nchw(x[..., : packed.stages[index].patch_embed.channels].contiguous())


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The program has its own dtypes."""
    if device.type == "meta":  # which autocast does not know
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_input(packed: PackedModel, x: Tensor) -> None:
    """Raise what :func:`run` raises on an ``x`` that does not fit, but for its size."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != packed.in_chans:
        hint = "; add the batch dimension with x.unsqueeze(0)" if isinstance(x, Tensor) and x.dim() == 3 else ""
        raise ValueError(f"the input must have shape (B, {packed.in_chans}, H, W), got {shape_of(x)}{hint}")
    if not x.is_floating_point():
        raise TypeError(f"the input must be floating point, got {x.dtype}: scale and normalise the image first")
    if x.device != packed.device:
        raise ValueError(f"the input is on {x.device} but the packed model is on {packed.device}; move the input")
