"""LayerNorm in the dtype of the residual stream."""
