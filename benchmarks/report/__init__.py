"""One command that measures a machine and writes what it found: ``python -m benchmarks.report`` (docs/benchmarks.md)."""
