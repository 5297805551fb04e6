"""Backends for inference: a table of what each can compute, and layers in its layout."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain_kernels import unpack
from hqqtrain_kernels.autocast import product_dtype

GROUP_SIZES = (32, 64, 128, 256)
"""Group sizes that all backends compute, and with which they were tried."""

ADVICE = "Use auto: hqqtrain's own kernels compute all bits, groups and axes."


@dataclass(frozen=True)
class Limits:
    """The layers that a backend can compute; all of them have groups along rows (axis 1) alone.

    Attributes:
        nbits: The bits that it computes, by the dtype of the model.
        devices: Types of devices.
        min_capability: Smallest compute capability of a GPU.
        multiple_of: What out_features and in_features must be multiples of.
        group_sizes: Group sizes.
    """

    nbits: Mapping[torch.dtype, tuple[int, ...]]
    devices: tuple[str, ...] = ("cuda",)
    min_capability: tuple[int, int] = (8, 0)
    multiple_of: tuple[int, int] = (32, 32)
    group_sizes: tuple[int, ...] = GROUP_SIZES

    def refusal(self, layer: HQQLinear) -> str | None:
        """Return why a layer cannot be computed, or None if it can."""
        layout, dtype = layer.layout, layer.compute_dtype
        bits = self.nbits.get(dtype)
        if bits is None:
            return _name(dtype)
        if layout.axis != 1:
            return "axis 0"
        if layout.nbits not in bits:
            return f"{layout.nbits} bits in {_name(dtype)}"
        if layout.group_size not in self.group_sizes:
            return f"groups of {layout.group_size}"
        rows, columns = self.multiple_of
        if layout.out_features % rows or layout.in_features % columns:
            return f"{layout.out_features} x {layout.in_features} weights"
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class RepackedLinear(nn.Module, ABC):
    """A linear layer whose codes, scale and zero are in the layout of another package.

    It computes forward only, in the dtype and on the device in which it was made.

    Args:
        layer: The layer to take over.
    """

    bias: Tensor | None

    def __init__(self, layer: HQQLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.compute_dtype
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().to(self.dtype))

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return x W'^T [rows, out_features], for contiguous x [rows, in_features] in `dtype`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features], in the dtype of x or of autocast."""
        y = self.product(x.reshape(-1, self.in_features).to(self.dtype).contiguous())
        if self.bias is not None:
            y = y + self.bias
        return y.to(product_dtype(x)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class InferenceBackend(ABC):
    """The kernels of another package.

    Attributes:
        name: The value of `quant.backend`.
        limits: What it can compute.
        package: The module that must be installed; None: PyTorch is enough.
        install: The argument of pip that installs it.
    """

    name: str
    limits: Limits
    package: str | None = None
    install: str = ""

    def refusal(self, layer: HQQLinear) -> str | None:
        """Return why a layer cannot be computed, or None if it can."""
        return self.limits.refusal(layer)

    @abstractmethod
    def repack(self, layer: HQQLinear) -> RepackedLinear:
        """Return a layer with the same values, for a layer that is not refused."""

    def check_usable(self, device: torch.device, dtype: torch.dtype) -> None:
        """Check that the package is there and computes in `dtype` on `device`.

        Raises:
            UserError: It is not, or does not.
        """
        if device.type not in self.limits.devices:
            allowed = " or ".join(self.limits.devices)
            raise UserError(
                f"backend={self.name}: computes on {allowed}, and the device is {device.type}. "
                f"{ADVICE}"
            )
        if dtype not in self.limits.nbits:
            allowed = " or ".join(map(_name, self.limits.nbits))
            raise UserError(
                f"backend={self.name}: computes in {allowed}, and the model is in {_name(dtype)} "
                f"(train.precision). {ADVICE}"
            )
        if self.package and importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"backend={self.name}: needs {self.package}, which is not installed: pip install "
                f"'{self.install}'. {ADVICE}"
            )
        if device.type == "cuda":
            needed, found = self.limits.min_capability, torch.cuda.get_device_capability(device)
            if found < needed or torch.version.hip:
                raise UserError(
                    f"backend={self.name}: needs an NVIDIA GPU of compute capability "
                    f"{needed[0]}.{needed[1]}, and {torch.cuda.get_device_name(device)} has "
                    f"{found[0]}.{found[1]}. Use auto."
                )


def codes_of(layer: HQQLinear) -> Tensor:
    """Return the codes of a layer, uint8 [out_features, in_features]."""
    packed = layer.W_q.detach().view(torch.uint8)
    return unpack(packed, layer.layout.nbits, layer.in_features)
