"""The shapes that operations are tested and timed at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cmt_fast.models.grids import image_size, stage_grids
from cmt_fast.models.variants import VARIANTS


@dataclass(frozen=True)
class StageShape:
    """What the operations of one stage see.

    Attributes:
        name: for tables, such as ``cmt_s/a``.
        batch, height, width, dim: of the map x (B, H, W, C).
        heads: of the attention.
        hidden: channels R inside the IRFFN.
        sr_ratio: reduction k of keys and values in each direction; 1 for none.
        qk_ratio: queries and keys have ``dim // qk_ratio`` channels.
        bias: whether q, k, v and the convolutions have biases.
        in_dim: channels before the patch embedding: of the stage before, of the stem in stage a; 0 where there is none.
    """

    name: str
    batch: int
    height: int
    width: int
    dim: int
    heads: int
    hidden: int
    sr_ratio: int
    qk_ratio: int = 1
    bias: bool = True
    in_dim: int = 0

    @property
    def queries(self) -> int:
        return self.height * self.width

    @property
    def keys(self) -> int:
        return (self.height // self.sr_ratio) * (self.width // self.sr_ratio)

    @property
    def qk_head_dim(self) -> int:
        return self.dim // self.qk_ratio // self.heads

    @property
    def v_head_dim(self) -> int:
        return self.dim // self.heads

    def __str__(self) -> str:
        return f"{self.name} ({self.batch}, {self.height}, {self.width}, {self.dim})"


def stage_shapes(variant: str, batch: int = 1, img_size: int | None = None) -> list[StageShape]:
    """The four stages of a published variant, by default at its published resolution."""
    config = VARIANTS[variant].config
    sr_ratios = config.get("sr_ratios", (8, 4, 2, 1))
    grids = stage_grids(image_size(img_size or VARIANTS[variant].resolution), sr_ratios)
    dims = config["embed_dims"]
    return [
        StageShape(f"{variant}/{stage}", batch, height, width, dim, heads, int(dim * ratio), sr, in_dim=in_dim)
        for stage, ((height, width), _), dim, heads, ratio, sr, in_dim in zip(
            "abcd", grids, dims, config["num_heads"], config["mlp_ratios"], sr_ratios, (config["stem_channel"], *dims)
        )
    ]


#: Small maps with the channels and hidden widths that make kernels fail.
ODD_SHAPES = (
    StageShape("ti-like", 2, 8, 6, 46, 1, 165, 2),
    StageShape("xs-like, H > W", 2, 9, 4, 52, 1, 196, 2),
    StageShape("b-like, two heads", 1, 5, 7, 152, 2, 331, 1),
    StageShape("s-like, k = 8", 2, 16, 8, 64, 2, 96, 8),
    StageShape("one key", 2, 4, 4, 76, 1, 76, 4),
    StageShape("d_qk < d_v, no biases", 3, 6, 6, 24, 2, 37, 2, qk_ratio=2, bias=False),
    StageShape("one pixel", 3, 1, 1, 3, 1, 5, 1),
)

#: The two that ``--quick`` keeps.
QUICK_SHAPES = (ODD_SHAPES[0], ODD_SHAPES[5])

#: Whole models in the image of tests/golden: aligned channels; and odd channels, unequal sides, q and k narrower than v.
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "aligned": dict(
        img_size=64,
        num_classes=10,
        embed_dims=(8, 16, 32, 64),
        stem_channel=8,
        fc_dim=48,
        num_heads=(1, 2, 4, 8),
        mlp_ratios=(4, 4, 4, 4),
        depths=(1, 1, 2, 1),
        sr_ratios=(8, 4, 2, 1),
        dp=0.0,
    ),
    "odd": dict(
        img_size=(96, 64),
        num_classes=7,
        embed_dims=(22, 44, 52, 72),
        stem_channel=13,
        fc_dim=40,
        num_heads=(1, 2, 2, 4),
        mlp_ratios=(3.6, 3.6, 3.77, 3.6),
        depths=(2, 1, 1, 1),
        sr_ratios=(4, 4, 2, 1),
        qkv_bias=False,
        qk_ratio=2,
        dp=0.0,
    ),
}
