"""Patch aggregation between stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmt_fast.ops.activated_conv.api import activated_conv
from cmt_fast.ops.layer_norm.api import layer_norm
from cmt_fast.ops.layout import nhwc


class PatchEmbed(nn.Module):
    """2x2 convolution with stride 2, then LayerNorm (paper, "patch aggregation").

    Args:
        grid_size: (H, W) of the output at the model's own ``img_size``, for the record; other sizes work.
        patch_size: kernel and stride.
        in_chans, embed_dim: channels in and out.
    """

    def __init__(
        self, grid_size: tuple[int, int], patch_size: int = 2, in_chans: int = 3, embed_dim: int = 768
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    @property
    def num_patches(self) -> int:
        """Tokens of the output at the model's own ``img_size``."""
        return self.grid_size[0] * self.grid_size[1]

    def forward(
        self, x: Tensor, *, before: Sequence[nn.Module] = (), dtype: torch.dtype | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """x (B, C, H, W) -> tokens (B, H' * W', embed_dim) and (H', W').

        Args:
            before: activation and BatchNorm that x is to pass first; on the kernels their results are not kept for the backward pass.
            dtype: of the tokens; None for the norm's own.
        """
        if before:
            act, bn = before
            x = activated_conv(nhwc(x), act=act, bn=bn, conv=self.proj)
        else:
            x = nhwc(self.proj(x))
        return layer_norm(x.flatten(1, 2), self.norm, dtype), (x.shape[1], x.shape[2])
