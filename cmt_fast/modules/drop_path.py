"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

from cmt_fast.ops.checks import PLAIN_DROP_PATHS


class DropPath(nn.Module):
    """Drop the whole branch of a sample with probability ``drop_prob`` in training (Huang et al., 2016).

    What is kept is divided by ``1 - drop_prob``. Accepts any shape whose first dimension is the batch.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)
        return x * mask

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


PLAIN_DROP_PATHS.append(DropPath)
