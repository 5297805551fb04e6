"""How large the benchmark is: Llama-70B's largest layer on a GPU, or a smoke test's toys."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """What is measured, where, and how often."""

    device: torch.device
    weight: tuple[int, int]
    """out_features and in_features of the layer."""
    outputs: tuple[tuple[int, int], ...]
    """What is dequantized."""
    batches: tuple[int, ...]
    """Rows of the linear layer's input."""
    tiny: tuple[int, int]
    """A layer that costs the GPU nothing, to measure Python."""
    product: int
    rounds: int

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.weight))


def full() -> Sizes:
    """Outputs of 32, 128 and 448 MiB in bf16."""
    device, weight = torch.device("cuda", torch.cuda.current_device()), (28672, 8192)
    outputs = ((2048, 8192), (8192, 8192), weight)
    return Sizes(device, weight, outputs, (1, 16, 128, 2048, 8192), (256, 256), 8192, 7)


def smoke() -> Sizes:
    """Everything runs once, in seconds, on a CPU; the figures mean nothing."""
    return Sizes(torch.device("cpu"), (128, 256), ((128, 256),), (1, 16), (64, 64), 256, 1)
