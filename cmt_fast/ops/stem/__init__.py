"""Stem of a packed model: three 3x3 convolutions with GELU."""
