"""A CMT block: three sub-layers, each one residual."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cmt_fast import functional
from cmt_fast.modules.drop_path import DropPath
from cmt_fast.modules.irffn import IRFFN
from cmt_fast.modules.lmhsa import LMHSA


class Block(nn.Module):
    """Y = LPU(X); Z = Y + drop_path(LMHSA(LN(Y))); out = Z + drop_path(IRFFN(LN(Z))) (paper, "CMT block").

    Args:
        dim: channels C.
        num_heads, qkv_bias, qk_scale, attn_drop, qk_ratio, sr_ratio: see :class:`LMHSA`.
        mlp_ratio: the IRFFN expands to ``int(dim * mlp_ratio)`` channels.
        drop: dropout of the attention output and inside the IRFFN.
        drop_path: probability of dropping a branch of a sample (stochastic depth).
        norm_layer: makes the norms from ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        qk_ratio: int = 1,
        sr_ratio: int = 1,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = LMHSA(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=drop,
            qk_ratio=qk_ratio,
            sr_ratio=sr_ratio,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = IRFFN(dim, int(dim * mlp_ratio), drop=drop)
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)  # the LPU's convolution

    def forward(self, x: Tensor, H: int, W: int, relative_pos: Tensor) -> Tensor:
        """x (B, H * W, C), relative_pos (heads, N, M) -> (B, H * W, C)."""
        x = functional.lpu(x.unflatten(1, (H, W)), self.proj).flatten(1, 2)
        x = self.attn(x, H, W, relative_pos, norm=self.norm1, drop_path=self.drop_path, shortcut=True)
        return self.mlp(x, H, W, norm=self.norm2, drop_path=self.drop_path, shortcut=True)
