"""Compare exported layers with the quantized layers that they were made from.

An export is compared as it was written: its files are read back, and the weight that the other
program will compute from them is compared with ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hqqtrain.common.errors import UserError

ROUNDED_STEPS = 0.25
"""Largest error of a layer that counts as `rounded`. A larger one is `approximate`.

Rounding the scale and bias of 8-bit codes to fp16 moves a weight by up to 0.16 steps.
"""


@dataclass(frozen=True)
class LayerComparison:
    """How far one exported layer is from ours.

    Attributes:
        name: The name of the module.
        max_error: The largest difference of a weight, in steps of its group: a step is the distance
            of two neighboring codes.
        squared_error: ||W' - W||^2, where W is our dequantized weight and W' the exported one.
        squared_norm: ||W||^2.
        weights: The number of weights.
        bytes: The bytes of the layer in the export.
    """

    name: str
    max_error: float
    squared_error: float
    squared_norm: float
    weights: int
    bytes: int

    @property
    def kind(self) -> str:
        """`exact`, `rounded` or `approximate`."""
        if self.max_error == 0:
            return "exact"
        return "rounded" if self.max_error <= ROUNDED_STEPS else "approximate"


@dataclass(frozen=True)
class ExportComparison:
    """How far an export is from the quantized model.

    Attributes:
        layers: The layers, in the order of the model.
    """

    layers: tuple[LayerComparison, ...]

    @property
    def counts(self) -> dict[str, int]:
        """The number of layers that are `exact`, `rounded` and `approximate`."""
        kinds = [layer.kind for layer in self.layers]
        return {kind: kinds.count(kind) for kind in ("exact", "rounded", "approximate")}

    def __repr__(self) -> str:
        """Return one line; all layers of a model would fill several pages."""
        counts = ", ".join(f"{kind}={count}" for kind, count in self.counts.items() if count)
        return f"{type(self).__name__}({counts or 'no layers'}, max_error={self.max_error:.3g})"

    @property
    def worst(self) -> LayerComparison | None:
        """The layer with the largest error in steps; None if nothing is quantized."""
        return max(self.layers, key=lambda layer: layer.max_error, default=None)

    @property
    def max_error(self) -> float:
        """The largest error of a weight, in steps."""
        return self.worst.max_error if self.worst else 0.0

    @property
    def relative_error(self) -> float:
        """||W' - W||^2 / ||W||^2 over all layers."""
        norm = sum(layer.squared_norm for layer in self.layers)
        return sum(layer.squared_error for layer in self.layers) / norm if norm else 0.0

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per weight of the quantized layers, with scales and zeros."""
        weights = sum(layer.weights for layer in self.layers)
        return 8 * sum(layer.bytes for layer in self.layers) / weights if weights else None

    def check(self, max_error: float | None) -> None:
        """Check that no weight is off by more than `max_error` steps; None: by any number.

        Raises:
            UserError: A weight is.
        """
        worst = self.worst
        if max_error is not None and worst and worst.max_error > max_error:
            raise UserError(
                f"export.max_error={max_error:g}: a weight of {worst.name} is off by "
                f"{worst.max_error:.3g} steps of its group. Use a larger export.max_error or null, "
                "or a format that keeps the weights: packed, hqq, or dense with export.dtype=fp32."
            )


def compare_layer(
    name: str, ours: Tensor, theirs: Tensor, steps: Tensor, stored: Iterable[Tensor]
) -> LayerComparison:
    """Compare a layer.

    Args:
        name: The name of the module.
        ours: Our dequantized weight [out_features, in_features], fp32.
        theirs: The exported weight, fp32, of the same shape.
        steps: The distance of two neighboring codes for every weight, fp32, of the same shape.
        stored: The tensors of the layer in the export.
    """
    error = (theirs - ours).double()
    in_steps = error.abs() / steps.double().clamp_min(torch.finfo(torch.float32).tiny)
    return LayerComparison(
        name=name,
        max_error=in_steps.max().item(),
        squared_error=error.square().sum().item(),
        squared_norm=ours.double().square().sum().item(),
        weights=ours.numel(),
        bytes=sum(tensor.nbytes for tensor in stored),
    )
