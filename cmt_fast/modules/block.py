"""A CMT block: three sub-layers, each one residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from cmt_fast import functional
from cmt_fast.modules.drop_path import DropPath
from cmt_fast.modules.irffn import IRFFN
from cmt_fast.modules.lmhsa import LMHSA
from cmt_fast.ops.checks import not_plain


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

    def forward(
        self,
        x: Tensor,
        H: int,
        W: int,
        relative_pos: Tensor,
        *,
        perceived: bool = False,
        following: Block | None = None,
    ) -> Tensor:
        """x (B, H * W, C), relative_pos (heads, N, M) -> (B, H * W, C).

        Args:
            x, H, W, relative_pos: the tokens of a map H x W, and the position bias of the stage.
            perceived: x has been through the LPU of this block already.
            following: a block whose LPU the result shall have been through; see :func:`run_blocks`.
        """
        if not perceived:
            x = functional.lpu(x.unflatten(1, (H, W)), self.proj).flatten(1, 2)
        x = self.attn(x, H, W, relative_pos, norm=self.norm1, drop_path=self.drop_path, shortcut=True)
        around = dict(norm=self.norm2, drop_path=self.drop_path, shortcut=True)
        if following is None:
            return self.mlp(x, H, W, **around)
        return self.mlp(x, H, W, **around, lpu=following.proj)


def run_blocks(blocks: Sequence[Block], x: Tensor, H: int, W: int, relative_pos: Tensor) -> Tensor:
    """The blocks of a stage one after the other: x (B, H * W, C), relative_pos (heads, N, M) -> (B, H * W, C).

    The IRFFN of one block and the LPU of the next are one operation, :func:`cmt_fast.functional.irffn_lpu`, unless the map between them can be seen:
    by a hook on a block or on its IRFFN, or because one of these is of another class, or has another forward.
    """
    perceived: dict[str, Any] = {}
    for block, following in zip(blocks, [*blocks[1:], None]):
        joined = {"following": following} if following is not None and _joins(block, following) else {}
        x = block(x, H, W, relative_pos, **perceived, **joined)
        perceived = {"perceived": True} if joined else {}
    return x


def _joins(block: Block, following: Block) -> bool:
    """Whether nothing but ``following`` sees the output of ``block``."""
    seen = not_plain("block", block, Block) + not_plain("following", following, Block)
    return not (seen or not_plain("mlp", block.mlp, IRFFN))
