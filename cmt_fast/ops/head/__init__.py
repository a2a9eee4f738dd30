"""Head of a packed model: 1x1 convolution, swish, average pool, classifier."""
