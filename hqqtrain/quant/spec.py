"""The quantization settings of one weight, resolved and checked against its shape."""

from dataclasses import dataclass
from typing import Any

import torch

from hqqtrain.common.errors import UserError
from hqqtrain.config.quant import QuantConfig
from hqqtrain_kernels import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of dtypes in the configuration."""


@dataclass(frozen=True)
class QuantSpec:
    """Quantization settings of one weight.

    Attributes:
        nbits: Bits of a code.
        group_size: Weights that share a scale and a zero; None: a whole row or column.
        axis: 1: groups run along in_features; 0: along out_features.
        solver: Name of the solver, a key of `SOLVERS`.
        meta_dtype: Storage dtype of scale and zero.
        zero: `float`, or `integer` for zeros that are codes.
    """

    nbits: int
    group_size: int | None
    axis: int
    solver: str
    meta_dtype: torch.dtype
    zero: str = "float"

    def layout(self, out_features: int, in_features: int, name: str = "") -> Layout:
        """Return the layout of weight `name` [out_features, in_features].

        Raises:
            UserError: group_size does not divide the length of the axis that groups run along.
        """
        key, length = ("in_features", in_features) if self.axis else ("out_features", out_features)
        g = length if self.group_size is None else self.group_size
        if length % g:
            raise UserError(
                f"quant.group_size={g}: does not divide {key}={length} of {name or 'a weight'} "
                f"(quant.axis={self.axis}); allowed are its divisors, e.g. "
                f"{_nearest_divisors(length, g)}, or null for one group of all {length}."
            )
        return Layout(out_features, in_features, self.nbits, g, self.axis)


def spec_from_config(config: QuantConfig, override: dict[str, Any] | None = None) -> QuantSpec:
    """Return the settings of `config`, with those in `override` replaced.

    `solver=auto` becomes a solver that suits the bits; see `QuantConfig.solver_for`.
    meta_dtype `auto` is bf16 up to 4 bits. At 8 bits it is fp32, because a zero near 128 in bf16
    would nearly double the error.
    """
    keys = ("nbits", "group_size", "axis", "solver", "zero")
    settings = {key: getattr(config, key) for key in keys} | (override or {})
    if settings["solver"] == "auto":
        settings["solver"] = config.solver_for(settings["nbits"])
    auto = torch.float32 if settings["nbits"] == 8 else torch.bfloat16
    return QuantSpec(**settings, meta_dtype=DTYPES.get(config.meta_dtype, auto))


def _nearest_divisors(length: int, wanted: int) -> str:
    """Return the two divisors of `length` nearest to `wanted`, as text."""
    divisors = [d for d in range(min(2, length), length + 1) if length % d == 0]
    nearest = sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:2])
    return " or ".join(map(str, nearest))
