"""When the Triton kernels of the stem can run a packed step, and why they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from cmt_fast.ops._triton.reasons import DTYPES, call_reasons
from cmt_fast.ops.patch_embed.reasons import tile_reasons
from cmt_fast.ops.stem.configs import MAX_CHANNELS


def stem_reasons(x: Tensor, *convolutions: tuple[Tensor, ...]) -> list[str]:
    """Reasons against ``cmt_fast_triton::stem``; an empty list if it can run.

    Args:
        x: (B, in_chans, H, W).
        convolutions: of each the weight, then the bias and, if there is one, the affine.
    """
    weights = [weight for weight, *_ in convolutions]
    vectors = [vector for _, *rest in convolutions for vector in rest]
    reasons = call_reasons(weights[0], x, *weights, *vectors)
    if x.dtype not in DTYPES:
        reasons.append(f"the image must be bfloat16, float16 or float32, got {x.dtype}")
    if any(t.dtype != weights[0].dtype for t in weights):
        reasons.append("the weights must have one dtype")
    if any(t.dtype != torch.float32 for t in vectors):
        reasons.append("biases and affines must be float32")
    if (widest := max(x.shape[1], len(weights[0]))) > MAX_CHANNELS:
        reasons.append(f"image and stem must have at most {MAX_CHANNELS} channels, got {widest}")
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:]))
    elements = max(span, len(weights[0]) * -(-x.shape[2] // 2) * -(-x.shape[3] // 2))
    if elements >= 2**31:
        reasons.append(f"an image and its maps must span less than 2^31 elements, got {elements}")
    return reasons


def stem_embed_reasons(x: Tensor, *parts: tuple[Tensor, ...]) -> list[str]:
    """Reasons against ``cmt_fast_triton::stem_embed``; an empty list if it can run.

    Args:
        x: (B, in_chans, H, W).
        parts: as in :func:`stem_reasons`, and the patch embedding: its weight, bias, scale and shift.
    """
    reasons = stem_reasons(x, *parts)
    embed_weight = parts[-1][0]
    tokens = x.shape[0] * ((x.shape[2] + 1) // 4) * ((x.shape[3] + 1) // 4)
    return reasons + tile_reasons(tokens, embed_weight)
