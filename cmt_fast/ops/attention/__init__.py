"""Attention with few keys and a dense learned bias."""
