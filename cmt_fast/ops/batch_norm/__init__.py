"""BatchNorm as a part of fused sub-layers: statistics over tiles, programs and processes, and its gradient."""
