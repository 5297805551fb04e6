"""Quantization as pure functions of tensors: solvers, packing, measures of error."""

from hqqtrain.quant.error import bits_per_weight, relative_error, squared_error, stored_bits
from hqqtrain.quant.quantize import Quantized, dequantize, quantize
from hqqtrain.quant.solvers import SOLVERS
from hqqtrain.quant.spec import DTYPES, QuantSpec, spec_from_config

__all__ = [
    "DTYPES", "SOLVERS", "QuantSpec", "Quantized", "bits_per_weight", "dequantize", "quantize",
    "relative_error", "spec_from_config", "squared_error", "stored_bits",
]  # fmt: skip
