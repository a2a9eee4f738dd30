"""Inverted residual feed-forward network as a module."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from cmt_fast import functional
from cmt_fast.modules.pointwise import PointwiseConv
from cmt_fast.ops.checks import not_plain

_IDENTITY = nn.Identity()


class IRFFN(nn.Module):
    """Inverted residual feed-forward network (paper, "IRFFN"); ``Mlp`` of the original.

    Args:
        in_features: channels C.
        hidden_features: channels R of the expanded map, by default C.
        out_features: channels of the output, by default C.
        drop: dropout of the hidden map and of the output.

    Attributes:
        recompute: see :func:`cmt_fast.functional.irffn`; False unless it is set.
    """

    recompute: bool = False

    def __init__(
        self, in_features: int, hidden_features: int | None = None, out_features: int | None = None, drop: float = 0.0
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        out_features = out_features or in_features
        self.conv1 = nn.Sequential(
            PointwiseConv(in_features, hidden_features), nn.GELU(), nn.BatchNorm2d(hidden_features, eps=1e-5)
        )
        self.proj = nn.Conv2d(hidden_features, hidden_features, 3, padding=1, groups=hidden_features)
        self.proj_act = nn.GELU()
        self.proj_bn = nn.BatchNorm2d(hidden_features, eps=1e-5)
        self.conv2 = nn.Sequential(PointwiseConv(hidden_features, out_features), nn.BatchNorm2d(out_features, eps=1e-5))
        self.drop = nn.Dropout(drop)

    def forward(
        self,
        x: Tensor,
        H: int,
        W: int,
        *,
        norm: nn.Module | None = None,
        drop_path: nn.Module | None = None,
        shortcut: bool = False,
        lpu: nn.Module | None = None,
    ) -> Tensor:
        """x (B, H * W, C) -> (B, H * W, C).

        Called as the original's, it is the network alone; a block adds its norm, drop path and shortcut, and may add the LPU of the next block, given
        its convolution.
        """
        expand, act1, bn1 = _members(self.conv1, 3)
        project, bn3 = _members(self.conv2, 2)
        run = functional.irffn if lpu is None else partial(functional.irffn_lpu, conv=lpu)
        y = run(
            x.unflatten(1, (H, W)),
            expand=expand,
            bn1=bn1,
            dw=self.proj,
            bn2=self.proj_bn,
            project=project,
            bn3=bn3,
            act1=act1,
            act2=self.proj_act,
            norm=norm,
            drop=self.drop,
            drop_path=drop_path,
            shortcut=shortcut,
            recompute=self.recompute,
        )
        return y.flatten(1, 2)


def _members(sequence: nn.Module, count: int) -> list[nn.Module]:
    """The members of a plain Sequential, which kernels may read; one with hooks, or another module, is called whole."""
    if isinstance(sequence, nn.Sequential) and len(sequence) == count and not not_plain("", sequence, nn.Sequential):
        return list(sequence)
    return [sequence] + [_IDENTITY] * (count - 1)
