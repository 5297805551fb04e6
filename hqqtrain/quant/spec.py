"""How one weight is to be quantized: settings, resolved and checked against its shape."""

from dataclasses import dataclass
from typing import Any

import torch

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import QuantConfig
from hqqtrain_kernels import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class QuantSpec:
    """nbits, group_size (None: the whole row or column), axis, solver, dtype of scale and zero."""

    nbits: int
    group_size: int | None
    axis: int
    solver: str
    meta_dtype: torch.dtype

    def layout(self, out_features: int, in_features: int, name: str = "") -> Layout:
        """The layout of a weight [out_features, in_features] called `name`.

        Raises UserError where group_size does not divide the axis that groups run along.
        """
        key, length = ("in_features", in_features) if self.axis else ("out_features", out_features)
        g = length if self.group_size is None else self.group_size
        if length % g:
            raise UserError(
                f"quant.group_size={g}: does not divide {key}={length} of {name or 'a weight'} "
                f"(quant.axis={self.axis}); allowed are its divisors, e.g. {_near(length, g)}, "
                f"or null for one group of all {length}."
            )
        return Layout(out_features, in_features, self.nbits, g, self.axis)


def spec_from_config(config: QuantConfig, override: dict[str, Any] | None = None) -> QuantSpec:
    """The settings of `config`, some of them replaced by those of one of its overrides.

    meta_dtype `auto` is bf16 up to 4 bits and fp32 at 8, where a zero near 128 in bf16 would
    nearly double the error.
    """
    keys = ("nbits", "group_size", "axis", "solver")
    settings = {key: getattr(config, key) for key in keys} | (override or {})
    auto = torch.float32 if settings["nbits"] == 8 else torch.bfloat16
    return QuantSpec(**settings, meta_dtype=DTYPES.get(config.meta_dtype, auto))


def _near(length: int, wanted: int) -> str:
    """The divisors of `length` next to `wanted`."""
    divisors = [d for d in range(min(2, length), length + 1) if length % d == 0]
    nearest = sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:2])
    return " or ".join(map(str, nearest))
