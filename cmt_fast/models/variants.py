"""The four published variants (paper Table 1). Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_RELEASE = "https://github.com/ggjy/CMT.pytorch/releases/download/release-v1/"


@dataclass(frozen=True)
class Variant:
    """One published model.

    Attributes:
        config: constructor arguments of :class:`cmt_fast.CMT` that differ from its defaults.
        resolution: side of the square input the paper trains and evaluates at, in pixels.
        url: the original's published checkpoint.
        paper_params: parameters the paper prints, in millions; CMT-S really has 26.26.
        paper_gmacs: multiply-adds the paper prints, in billions.
        paper_top1: ImageNet-1K top-1 the original repository reports, in percent.
    """

    config: dict[str, Any]
    resolution: int
    url: str
    paper_params: float
    paper_gmacs: float
    paper_top1: float


VARIANTS: dict[str, Variant] = {
    "cmt_ti": Variant(
        config=dict(
            embed_dims=(46, 92, 184, 368),
            stem_channel=16,
            num_heads=(1, 2, 4, 8),
            depths=(2, 2, 10, 2),
            mlp_ratios=(3.6,) * 4,
        ),
        resolution=160,
        url=_RELEASE + "cmt_tiny.pth",
        paper_params=9.49,
        paper_gmacs=0.64,
        paper_top1=79.0,
    ),
    "cmt_xs": Variant(
        config=dict(
            embed_dims=(52, 104, 208, 416),
            stem_channel=16,
            num_heads=(1, 2, 4, 8),
            depths=(3, 3, 12, 3),
            mlp_ratios=(3.77,) * 4,
        ),
        resolution=192,
        url=_RELEASE + "cmt_xs.pth",
        paper_params=15.24,
        paper_gmacs=1.54,
        paper_top1=81.8,
    ),
    "cmt_s": Variant(
        config=dict(
            embed_dims=(64, 128, 256, 512),
            stem_channel=32,
            num_heads=(1, 2, 4, 8),
            depths=(3, 3, 16, 3),
            mlp_ratios=(4,) * 4,
        ),
        resolution=224,
        url=_RELEASE + "cmt_small.pth",
        paper_params=25.14,
        paper_gmacs=4.04,
        paper_top1=83.5,
    ),
    "cmt_b": Variant(
        config=dict(
            embed_dims=(76, 152, 304, 608),
            stem_channel=38,
            num_heads=(1, 2, 4, 8),
            depths=(4, 4, 20, 4),
            mlp_ratios=(4,) * 4,
            dp=0.3,
        ),
        resolution=256,
        url=_RELEASE + "cmt_base.pth",
        paper_params=45.72,
        paper_gmacs=9.33,
        paper_top1=84.5,
    ),
}
