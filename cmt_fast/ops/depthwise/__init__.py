"""Depthwise convolutions: 3x3 with shortcut, and k x k with stride k."""
