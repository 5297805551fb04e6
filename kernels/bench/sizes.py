"""Sizes of the benchmark: Llama-70B's largest layer on a GPU, or toy sizes for a smoke test."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """Device, shapes and number of rounds.

    Attributes:
        device: Where to measure.
        weight: out_features and in_features of the layer.
        outputs: Shapes of the weights that are dequantized.
        batches: Rows of the linear layer's input.
        tiny: Shape of a layer that costs the GPU next to nothing, to measure Python.
        product: Size of the square matrix product that measures the machine's limit.
        rounds: Rounds of every measurement.
    """

    device: torch.device
    weight: tuple[int, int]
    outputs: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    tiny: tuple[int, int]
    product: int
    rounds: int

    @property
    def shape(self) -> str:
        """The shape of the layer's weight, as a row shows it."""
        return "x".join(map(str, self.weight))


def full() -> Sizes:
    """Return the sizes for a GPU. Outputs are 32, 128 and 448 MiB in bf16."""
    device, weight = torch.device("cuda", torch.cuda.current_device()), (28672, 8192)
    outputs = ((2048, 8192), (8192, 8192), weight)
    return Sizes(device, weight, outputs, (1, 16, 128, 2048, 8192), (256, 256), 8192, 7)


def smoke() -> Sizes:
    """Return sizes with which everything runs once on a CPU, in seconds. Figures mean nothing."""
    return Sizes(torch.device("cpu"), (128, 256), ((128, 256),), (1, 16), (64, 64), 256, 1)
