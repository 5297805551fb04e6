"""Models that other programs have quantized, taken over code by code."""
