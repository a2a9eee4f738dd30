"""Measuring launch configurations on a GPU (docs/tuning.md). Tables that the package ships lie in ``tables/``."""
