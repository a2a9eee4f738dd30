"""The paper's compound scaling rule (eq. 17): depth, width and resolution grow together from CMT-S."""

from __future__ import annotations

import math
from typing import Any

from cmt_fast.models.variants import VARIANTS

#: Growth of depth, width and resolution when phi grows by one (paper, "determined by grid search").
ALPHA, BETA, GAMMA = 1.2, 1.3, 1.15

_LARGEST_PHI = 10


def scaled_config(phi: float, *, alpha: float = ALPHA, beta: float = BETA, gamma: float = GAMMA) -> dict[str, Any]:
    """Constructor arguments of the CMT that the compound rule gives for ``phi``: ``CMT(**scaled_config(0.5))``.

    Depths are multiplied by ``alpha ** phi``, widths by ``beta ** phi`` and the input's side by ``gamma ** phi``, from
    CMT-S (``phi = 0``, which is returned exactly), then rounded: depths to at least one block, the first stage's width
    to an even number (stage widths double and so do the heads, so every stage keeps that width a head; the stem has half
    of it), the side to a multiple of 32 pixels. Expansion, reductions and the head's width stay those of CMT-S.

    The paper asks for ``alpha * beta^1.5 * gamma^2`` of about 2.5 and says that the FLOPs grow by that factor a step;
    with its own 1.2, 1.3 and 1.15 the product is 2.35. Neither is what the network does: the matrix products (84 % of
    CMT-S are IRFFN's 1x1 convolutions and the projections) grow by ``alpha * beta^2 * gamma^2`` = 2.68, the
    attention products by ``alpha * beta * gamma^4`` = 2.73, the depthwise convolutions by ``alpha * beta * gamma^2`` =
    2.06. Counted and fitted over phi from -2 to 3, the multiply-adds grow 2.64 times a step (``docs/math.md``, section 11).
    The published variants do not follow the rule either: they are rounded by hand, and
    are in :data:`cmt_fast.models.variants.VARIANTS`.

    Args:
        phi: the compound coefficient, any real number from -10 to 10.
        alpha, beta, gamma: growth a step, each at least 1.

    Returns:
        ``img_size``, ``embed_dims``, ``stem_channel``, ``num_heads``, ``depths`` and ``mlp_ratios``.

    Raises:
        ValueError: if ``phi`` is outside of its range or a growth factor below 1.
    """
    if isinstance(phi, bool) or not isinstance(phi, (int, float)) or not abs(phi) <= _LARGEST_PHI:
        raise ValueError(f"phi must be a number from -{_LARGEST_PHI} to {_LARGEST_PHI}, got {phi!r}")
    for name, growth in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if not (math.isfinite(growth) and growth >= 1):
            raise ValueError(f"{name} must be at least 1 (paper eq. 17), got {growth!r}")
    base = VARIANTS["cmt_s"]
    half_width = max(1, round(base.config["embed_dims"][0] / 2 * beta**phi))
    return dict(
        base.config,
        img_size=32 * max(1, round(base.resolution / 32 * gamma**phi)),
        embed_dims=tuple(2 * half_width * 2**stage for stage in range(4)),
        stem_channel=half_width,
        depths=tuple(max(1, round(depth * alpha**phi)) for depth in base.config["depths"]),
    )
