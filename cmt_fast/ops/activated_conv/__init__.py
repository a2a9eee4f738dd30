"""GELU, BatchNorm and the convolution after them: what lies between two convolutions of the stem."""
