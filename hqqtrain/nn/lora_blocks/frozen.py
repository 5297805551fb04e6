"""The frozen part of a block: weights, biases and scalings, and a dense weight kept shortly."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from hqqtrain.nn.lora_blocks.adapted_linear import AdaptedLinear
from hqqtrain.nn.lora_blocks.products import Weight, dense_weight
from hqqtrain_kernels.matmul import PackedWeight, WeightParams


class FrozenLinears(NamedTuple):
    """The linears of a block without A_i and B_i.

    A tuple is one opaque argument for autograd. A function must save the tensors in it by
    `save_for_backward`, because FSDP2 frees their memory and fills it again.

    Attributes:
        weights: The weight of each linear.
        biases: The bias of each linear [N_i], or None.
        scalings: The scaling of each adapter.
    """

    weights: tuple[Weight, ...]
    biases: tuple[Tensor | None, ...]
    scalings: tuple[float, ...]

    @classmethod
    def of(cls, linears: Sequence[AdaptedLinear]) -> Self:
        """Read the parameters of `linears`."""
        return cls(
            tuple(linear.weight for linear in linears),
            tuple(linear.bias for linear in linears),
            tuple(linear.scaling for linear in linears),
        )

    def tensors(self) -> list[Tensor]:
        """Return the tensors of all weights, to save them."""
        tensors: list[Tensor] = []
        for weight in self.weights:
            tensors += weight[:3] if isinstance(weight, PackedWeight) else [weight]
        return tensors

    def settings(self) -> "FrozenSettings":
        """Return what is not a tensor, to keep it beside the saved tensors."""
        params = tuple(w.params if isinstance(w, PackedWeight) else None for w in self.weights)
        return FrozenSettings(params, self.scalings)


class FrozenSettings(NamedTuple):
    """The settings of a block's weights: with the saved tensors, they are the weights again.

    Attributes:
        params: The parameters of each packed weight; None for a dense one.
        scalings: The scaling of each adapter.
    """

    params: tuple[WeightParams | None, ...]
    scalings: tuple[float, ...]

    def take_weights(self, tensors: Iterator[Tensor]) -> list[Weight]:
        """Return the weights, from as many of the saved `tensors` as they need."""
        return [
            next(tensors)
            if params is None
            else PackedWeight(next(tensors), next(tensors), next(tensors), params)
            for params in self.params
        ]


class KeptWeight:
    """A dense weight, from the recomputation of a layer to its backward pass, which follows.

    Autograd forgets everything of a recomputation but the saved tensors, so the block holds it.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def keep(self, weight: Tensor) -> None:
        """Keep a weight, in place of an earlier one."""
        self._weight = weight

    def take(self, weights: Sequence[Weight], dtype: torch.dtype) -> Tensor:
        """Return the kept weight in `dtype` and forget it; without one, dequantize `weights`."""
        kept, self._weight = self._weight, None
        return kept if kept is not None and kept.dtype == dtype else dense_weight(weights, dtype)
