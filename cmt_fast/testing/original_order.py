"""The original's operation order in plain PyTorch: the baseline of every benchmark."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmt_fast.models.cmt import CMT
from cmt_fast.modules import IRFFN, LMHSA, Block


class _Swish(torch.autograd.Function):
    """x * sigmoid(x), keeping x alone for the backward pass, as the original does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class OriginalOrder(nn.Module):
    """Run a :class:`cmt_fast.CMT` as the original code would: same parameters, the original's operations and layouts.

    Tokens become NCHW maps by permute and reshape around every convolution, 1x1 convolutions are convolutions, every
    activation, norm and sum is its own operation, and maps are made contiguous between stages. Training and evaluation
    mode both work. Use it to measure against; for work, use the model itself.

    Args:
        model: whose modules are used (not copied).
    """

    def __init__(self, model: CMT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) of the model's own ``img_size`` -> (B, num_classes).

        Raises:
            ValueError: if the input has another size, which the original does not take.
        """
        m: Any = self.model
        if tuple(x.shape[2:]) != tuple(m.img_size):
            raise ValueError(f"the original takes inputs of its own size {m.img_size}, got {tuple(x.shape[2:])}")
        x = m.stem_norm1(m.stem_relu1(m.stem_conv1(x)))
        x = m.stem_norm2(m.stem_relu2(m.stem_conv2(x)))
        x = m.stem_norm3(m.stem_relu3(m.stem_conv3(x)))
        for stage in m.stages:
            embed = m.get_submodule(f"patch_embed_{stage}")
            x = embed.proj(x)
            h, w = x.shape[2:]
            x = embed.norm(x.flatten(2).transpose(1, 2))
            for block in m.get_submodule(f"blocks_{stage}"):
                x = _block(block, x, h, w, m.get_parameter(f"relative_pos_{stage}"))
            if stage != m.stages[-1]:
                x = x.reshape(-1, h, w, x.shape[2]).permute(0, 3, 1, 2).contiguous()
        x = m._bn(m._fc(_to_map(x, h, w)))
        x = m._avg_pooling(_Swish.apply(x)).flatten(1)
        return m.head(m.pre_logits(m._drop(x)))


def _to_map(x: Tensor, h: int, w: int) -> Tensor:
    """(B, N, C) -> (B, C, H, W)"""
    return x.permute(0, 2, 1).reshape(x.shape[0], x.shape[2], h, w)


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C)"""
    return x.flatten(2).permute(0, 2, 1)


def _block(block: Block, x: Tensor, h: int, w: int, relative_pos: Tensor) -> Tensor:
    feature = _to_map(x, h, w)
    x = _to_tokens(block.proj(feature) + feature)
    x = x + block.drop_path(_attention(block.attn, block.norm1(x), h, w, relative_pos))
    return x + block.drop_path(_mlp(block.mlp, block.norm2(x), h, w))


def _attention(attn: LMHSA, x: Tensor, h: int, w: int, relative_pos: Tensor) -> Tensor:
    def heads(x: Tensor) -> Tensor:  # (B, n, heads * d) -> (B, heads, n, d)
        return x.reshape(x.shape[0], x.shape[1], attn.num_heads, -1).permute(0, 2, 1, 3)

    q = heads(attn.q(x))
    reduced = x
    if attn.sr is not None:
        reduced = attn.sr(_to_map(x, h, w))
        reduced = reduced.reshape(*reduced.shape[:2], -1).permute(0, 2, 1)
    k, v = heads(attn.k(reduced)), heads(attn.v(reduced))
    weights = (q @ k.transpose(-2, -1)) * attn.scale + relative_pos
    weights = attn.attn_drop(weights.softmax(dim=-1))
    x = (weights @ v).transpose(1, 2).reshape(x.shape)
    return attn.proj_drop(attn.proj(x))


def _mlp(mlp: IRFFN, x: Tensor, h: int, w: int) -> Tensor:
    expand, act, bn1 = cast(Any, mlp.conv1)
    project, bn3 = cast(Any, mlp.conv2)
    x = bn1(act(F.conv2d(_to_map(x, h, w), expand.weight, expand.bias)))
    x = mlp.drop(x)
    x = mlp.proj_bn(mlp.proj_act(mlp.proj(x) + x))
    x = _to_tokens(bn3(F.conv2d(x, project.weight, project.bias)))
    return mlp.drop(x)
