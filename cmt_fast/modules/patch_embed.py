"""Patch aggregation between stages."""

from __future__ import annotations

from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x (B, C, H, W) -> tokens (B, H' * W', embed_dim) and (H', W')."""
        x = self.proj(x)
        size = (x.shape[2], x.shape[3])
        return self.norm(x.flatten(2).transpose(1, 2)), size
