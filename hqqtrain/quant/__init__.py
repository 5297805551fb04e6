"""Quantization of one weight: settings, solvers, packing and errors."""
