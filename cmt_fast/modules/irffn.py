"""Inverted residual feed-forward network as a module."""

from __future__ import annotations

from torch import Tensor, nn

from cmt_fast import functional
from cmt_fast.modules.pointwise import PointwiseConv


class IRFFN(nn.Module):
    """Inverted residual feed-forward network (paper, "IRFFN"); ``Mlp`` of the original.

    Args:
        in_features: channels C.
        hidden_features: channels R of the expanded map, by default C.
        out_features: channels of the output, by default C.
        drop: dropout of the hidden map and of the output.
    """

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
    ) -> Tensor:
        """x (B, H * W, C) -> (B, H * W, C).

        Called as the original's, it is the network alone; a block adds its norm, drop path and shortcut.
        """
        y = functional.irffn(
            x.unflatten(1, (H, W)),
            expand=self.conv1[0],
            bn1=self.conv1[2],
            dw=self.proj,
            bn2=self.proj_bn,
            project=self.conv2[0],
            bn3=self.conv2[1],
            norm=norm,
            drop=self.drop,
            drop_path=drop_path,
            shortcut=shortcut,
        )
        return y.flatten(1, 2)
