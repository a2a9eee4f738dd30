"""Inverted residual feed-forward network: the third sub-layer of a CMT block."""
