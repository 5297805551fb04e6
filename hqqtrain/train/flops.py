"""Model FLOPs utilisation: how much of the GPU's matrix rate the training gets out of it."""

from torch import nn

from hqqtrain.nn import HQQLinear

PEAK = {
    "H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""FLOP/s of dense bf16 matrix products by a part of the device's name, from the data sheets."""


def peak_flops(device_name: str) -> float | None:
    """The rate of one device; None where it is not known, as for a CPU."""
    return next((rate for part, rate in PEAK.items() if part in device_name), None)


def flops_per_token(model: nn.Module) -> int:
    """FLOPs of one trained token, over the linear layers, recomputation not counted.

    Frozen ones take 2 a weight forward and 2 for the gradient to their input; trained ones
    another 2. Attention's own products are left out, which matter for long sequences only.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, HQQLinear):
            total += 4 * module.out_features * module.in_features
        elif isinstance(module, nn.Linear):
            trained = module.weight.requires_grad
            total += (6 if trained else 4) * module.out_features * module.in_features
    return total


def utilisation(model: nn.Module, device_name: str, world_size: int) -> float | None:
    """What one token a second is of the peak of all devices; times the rate it is the MFU.

    None where the peak is not known.
    """
    peak = peak_flops(device_name)
    return flops_per_token(model) / (peak * world_size) if peak else None
