"""The steps of a packed model that have Triton kernels, by name: what is verified, timed and tuned. A new step is one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from cmt_fast.inference.program import align_rows
from cmt_fast.inference.torch_steps import StepFunctions
from cmt_fast.testing.packed_attention import AttentionCall, attention_call
from cmt_fast.testing.packed_head import HeadCall, head_call
from cmt_fast.testing.packed_irffn import depthwise_project_call, expand_call
from cmt_fast.testing.packed_lpu import lpu_call
from cmt_fast.testing.packed_patch_embed import PatchEmbedCall, patch_embed_call
from cmt_fast.testing.packed_stem import StemEmbedCall, stem_embed_call
from cmt_fast.testing.shapes import StageShape
from cmt_fast.testing.tolerance import Comparison, compare


class StepCall(Protocol):
    """A step with its inputs."""

    def run(self, functions: StepFunctions) -> Any:
        """The step's outputs: a tensor or a tuple of them."""

    def double(self) -> StepCall:
        """The same numbers in float64."""


def attention(shape: StageShape, dtype: torch.dtype, device: torch.device) -> AttentionCall:
    """In the form that ``pack`` chooses, absorbed in stages a and b, and with the table as a program for a GPU has it."""
    call = attention_call(shape, dtype, absorbed=shape.name[-1:] in ("a", "b"), device=device)
    return dataclasses.replace(call, table=align_rows(call.table))


def stem(shape: StageShape, dtype: torch.dtype, device: torch.device) -> StemEmbedCall:
    """With the patch embedding that makes the tokens of ``shape``."""
    image = (shape.batch, 3, 4 * shape.height, 4 * shape.width)
    return stem_embed_call(image, shape.in_dim or shape.dim, shape.dim, dtype, device=device)


def patch_embed(shape: StageShape, dtype: torch.dtype, device: torch.device) -> PatchEmbedCall:
    map_ = (shape.batch, 2 * shape.height, 2 * shape.width, shape.in_dim or shape.dim)
    return patch_embed_call(map_, shape.dim, dtype, device=device)


def head(shape: StageShape, dtype: torch.dtype, device: torch.device) -> HeadCall:
    return head_call((shape.batch, shape.height, shape.width, shape.dim), dtype, device=device)


#: From a stage, a dtype and a device to a call.
STEPS: dict[str, Callable[[StageShape, torch.dtype, torch.device], StepCall]] = {
    "stem": stem,
    "patch_embed": patch_embed,
    "lpu": lambda shape, dtype, device: lpu_call(shape, dtype, device=device),
    "attention": attention,
    "head": head,
    "expand": lambda shape, dtype, device: expand_call(shape, dtype, device=device),
    "depthwise_project": lambda shape, dtype, device: depthwise_project_call(shape, dtype, device=device),
}
#: Steps that a model runs in these stages only; the patch embedding of stage a belongs to the stem.
_STAGES = {"stem": "a", "patch_embed": "bcd", "head": "d"}


def runs_in(step: str, shape: StageShape) -> bool:
    """Whether a model runs ``step`` at ``shape``, whose name ends in its stage; a shape without a name has every step."""
    return shape.name[-1:] in _STAGES.get(step, "abcd")


def judge(outputs: object, exact: object, plain: object) -> list[Comparison]:
    """The outputs of a step, beside those of its float64 run and of plain PyTorch, by the tolerance policy."""
    triples = zip(tensors_of(outputs), tensors_of(exact), tensors_of(plain), strict=True)
    return [compare(f"output {i}", *triple) for i, triple in enumerate(triples)]


def tensors_of(x: object) -> list[Tensor]:
    """All tensors in tuples and dataclasses."""
    if isinstance(x, Tensor):
        return [x]
    if dataclasses.is_dataclass(x):
        return [t for field in dataclasses.fields(x) for t in tensors_of(getattr(x, field.name))]
    return [t for part in x for t in tensors_of(part)] if isinstance(x, (tuple, list)) else []
