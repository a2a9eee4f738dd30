"""Lightweight multi-head self-attention: the second sub-layer of a CMT block."""
