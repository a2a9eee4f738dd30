"""Patch embedding of a packed model: 2x2 patches, matrix product, LayerNorm."""
