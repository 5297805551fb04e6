"""Sources of weights, which read rows of tensors by name."""
