"""Quantization as pure functions of tensors: solvers, packing, and error measures."""

from hqqtrain.quant.error import relative_error, squared_error, stored_bits
from hqqtrain.quant.quantize import Quantized, dequantize, enqueue, not_finite_error, quantize
from hqqtrain.quant.solvers import SOLVERS
from hqqtrain.quant.spec import DTYPES, QuantSpec, spec_from_config

__all__ = [
    "DTYPES", "SOLVERS", "QuantSpec", "Quantized", "dequantize", "enqueue", "not_finite_error",
    "quantize", "relative_error", "spec_from_config", "squared_error", "stored_bits",
]  # fmt: skip
