"""Quantization that weighs errors by the inputs of a layer, and passes them on between columns."""
