"""Quantization as pure functions of tensors: solvers, packing, measures of error."""

from hqqtrain.quant.error import relative_error, squared_error, stored_bits
from hqqtrain.quant.quantize import Quantized, dequantize, quantize
from hqqtrain.quant.solvers import SOLVERS
from hqqtrain.quant.spec import DTYPES, QuantSpec, spec_from_config

__all__ = [
    "DTYPES", "SOLVERS", "QuantSpec", "Quantized", "dequantize", "quantize",
    "relative_error", "spec_from_config", "squared_error", "stored_bits",
]  # fmt: skip
