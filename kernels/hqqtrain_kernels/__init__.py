"""Packed low-bit weights: their layout in memory, and the operators that compute with them."""

from hqqtrain_kernels.layout import LAYOUT_VERSION, Layout
from hqqtrain_kernels.ops import dequantize, linear
from hqqtrain_kernels.reference import pack, unpack

__all__ = ["LAYOUT_VERSION", "Layout", "dequantize", "linear", "pack", "unpack"]
