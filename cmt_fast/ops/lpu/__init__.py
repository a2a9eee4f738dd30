"""Local perception unit: depthwise 3x3 convolution with shortcut."""
