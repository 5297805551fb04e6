"""Prepare a quantized model for fast generation."""
