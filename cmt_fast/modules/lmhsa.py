"""Lightweight multi-head self-attention as a module."""

from __future__ import annotations

from torch import Tensor, nn

from cmt_fast import functional


class LMHSA(nn.Module):
    """Lightweight multi-head self-attention (paper, "LMHSA"); ``Attention`` of the original.

    Args:
        dim: channels C.
        num_heads: heads; divides ``dim`` and ``dim // qk_ratio``.
        qkv_bias: give q, k and v a bias.
        qk_scale: factor of the logits; None means ``(dim // num_heads) ** -0.5``, whatever ``qk_ratio`` is.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
        qk_ratio: q and k have ``dim // qk_ratio`` channels.
        sr_ratio: k: keys and values come from a map reduced k times by a k x k depthwise convolution and BatchNorm.
    """

    sr: nn.Sequential | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_ratio: int = 1,
        sr_ratio: int = 1,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qk_dim = dim // qk_ratio
        if dim % num_heads or self.qk_dim % num_heads:
            raise ValueError(
                f"num_heads must divide dim and dim // qk_ratio, got num_heads {num_heads}, dim {dim}, qk_ratio {qk_ratio}"
            )
        self.q = nn.Linear(dim, self.qk_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, self.qk_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Sequential(
                nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, groups=dim),
                nn.BatchNorm2d(dim, eps=1e-5),
            )
        else:
            self.sr = None

    def forward(
        self,
        x: Tensor,
        H: int,
        W: int,
        relative_pos: Tensor,
        *,
        norm: nn.Module | None = None,
        drop_path: nn.Module | None = None,
        shortcut: bool = False,
    ) -> Tensor:
        """x (B, H * W, C), relative_pos (heads, N, M) -> (B, H * W, C).

        Called as the original's, it is the attention alone; a block adds its norm, drop path and shortcut.
        """
        y = functional.lmhsa(
            x.unflatten(1, (H, W)),
            relative_pos,
            q=self.q,
            k=self.k,
            v=self.v,
            proj=self.proj,
            num_heads=self.num_heads,
            scale=self.scale,
            reduction=self.sr,
            norm=norm,
            attn_drop=self.attn_drop,
            proj_drop=self.proj_drop,
            drop_path=drop_path,
            shortcut=shortcut,
        )
        return y.flatten(1, 2)
