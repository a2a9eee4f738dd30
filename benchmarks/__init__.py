"""Benchmarks of the operations at the shapes of the published models: ``python -m benchmarks.run``."""
