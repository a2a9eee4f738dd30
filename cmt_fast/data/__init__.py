"""Images in, tensors out: reading, preprocessing and the built-in data set."""
