"""GPUs by name: memory and speed, from their data sheets, for predictions and MFU."""

import re
from dataclasses import dataclass

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        memory: Bytes that a program can use, as the driver reports them.
        flops: Peak FLOP/s of dense bf16 products; None if unknown.
        bandwidth: Peak bytes/s of its memory; None if unknown.
        link: Peak bytes/s that it receives from another GPU of its node: NVLink or PCIe.
    """

    memory: int
    flops: float | None = None
    bandwidth: float | None = None
    link: float = 32e9


GPUS = {
    "B200": Gpu(178 * GIB, 2250e12, 8.0e12, 900e9),
    "GH200": Gpu(95 * GIB, 989e12, 4.0e12, 450e9),
    "H200": Gpu(139 * GIB, 989e12, 4.8e12, 450e9),
    "H100": Gpu(79 * GIB, 989e12, 3.35e12, 450e9),
    "A100": Gpu(79 * GIB, 312e12, 2.04e12, 300e9),
    "A100-40GB": Gpu(39 * GIB, 312e12, 1.56e12, 300e9),
    "L40S": Gpu(44 * GIB, 362e12, 0.86e12, 32e9),
    "A6000": Gpu(47 * GIB, 155e12, 0.77e12, 32e9),
    "A10": Gpu(22 * GIB, 125e12, 0.60e12, 32e9),
    "L4": Gpu(22 * GIB, 121e12, 0.30e12, 32e9),
    "RTX 5090": Gpu(31 * GIB, 210e12, 1.79e12, 64e9),
    "RTX 5080": Gpu(15 * GIB, 113e12, 0.96e12, 64e9),
    "RTX 4090": Gpu(23 * GIB, 165e12, 1.01e12, 32e9),
    "RTX 4080": Gpu(15 * GIB, 97e12, 0.72e12, 32e9),
    "RTX 4070": Gpu(11 * GIB, 58e12, 0.50e12, 32e9),
    "RTX 3090": Gpu(23 * GIB, 71e12, 0.94e12, 32e9),
}
"""Kinds of GPUs by name. FLOP/s are those with fp32 accumulation, without sparsity."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)(GB|GiB)", re.IGNORECASE)


def find_gpu(name: str) -> Gpu | None:
    """Return the kind that `name` stands for, such as `RTX4090`, or `24GB` for its memory alone."""
    if size := _SIZE.fullmatch(name.replace(" ", "")):
        unit = GB if size[2].lower() == "gb" else GIB
        return Gpu(int(float(size[1]) * unit))
    return next((gpu for known, gpu in GPUS.items() if _plain(known) == _plain(name)), None)


def gpu_of_device(device_name: str) -> Gpu | None:
    """Return the kind of a device by the name that its driver reports; None if it is unknown."""
    for name, gpu in GPUS.items():
        pattern = name.replace(" ", "[ -]?")
        if re.search(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", device_name, re.IGNORECASE):
            return gpu
    return None


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
