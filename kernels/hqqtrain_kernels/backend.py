"""Choice of the backend: Triton kernels on a GPU that supports them, plain PyTorch elsewhere.

The choice holds for the whole process. A model that is quantized, trained and measured by
different code would not be comparable with itself. `auto` selects Triton wherever it can run.
"""

import functools
import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "torch")
MIN_CAPABILITY = (8, 0)
"""Compute capability of Ampere, the first architecture with bf16 matrix products."""

_backend = "auto"


def set_backend(backend: str) -> str:
    """Set the backend of this process.

    Returns:
        A line for the log: which backend runs, and why.

    Raises:
        ValueError: The name is unknown, or it is `triton` and Triton cannot run here.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend}: allowed are {', '.join(BACKENDS)}; "
            "hqqtrain.prepare_for_inference(model, backend) takes those of other packages"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = _obstacle(device)
    if backend == "triton" and obstacle and not _is_interpreted():
        raise ValueError(f"backend=triton: {obstacle}. Use backend=auto or torch.")
    _backend = backend
    _use_triton.cache_clear()
    if backend == "torch":
        return "torch: requested"
    if backend == "triton":
        return "triton: requested"
    return f"torch: {obstacle}" if obstacle else f"triton: {torch.cuda.get_device_name()}"


def use_triton(device: torch.device) -> bool:
    """Whether Triton kernels compute with the tensors on `device`."""
    return _use_triton(device.type, device.index)


@functools.cache
def _use_triton(device_type: str, index: int | None) -> bool:
    if _backend == "torch":
        return False
    if _backend == "triton" and _is_interpreted():
        return True
    device = torch.device(device_type if index is None else f"{device_type}:{index}")
    return _obstacle(device) is None


def _is_interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU: for tests, never chosen by `auto`."""
    return _has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _obstacle(device: torch.device) -> str | None:
    """Return the reason why Triton kernels cannot run on `device`, or None if they can."""
    if device.type != "cuda":
        return f"the device is {device.type}, and the kernels need an NVIDIA GPU"
    if not _has_triton():
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability}, and 8.0 is needed"
    return None
