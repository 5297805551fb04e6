"""Products with packed weights by the kernels of other packages, for inference."""
