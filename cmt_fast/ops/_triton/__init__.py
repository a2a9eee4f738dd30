"""What the Triton kernels of all operations share: jit helpers of one formula each, and the launch as data."""
