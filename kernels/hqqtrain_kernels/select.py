"""Who computes: Triton kernels on a GPU that has them, plain torch everywhere else.

One choice for the whole process, because a model is quantized, trained and measured by the same
code or not at all comparably. `auto` takes Triton wherever it can run.
"""

import functools
import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "torch")
LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with bf16 products."""

_backend = "auto"


def use(backend: str) -> str:
    """Chooses the backend of this process; returns what runs and why, for a log.

    Raises ValueError for an unknown name, and for `triton` where it cannot run.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend}: allowed are {', '.join(BACKENDS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = _obstacle(device)
    if backend == "triton" and obstacle and not _interpreted():
        raise ValueError(f"backend=triton: {obstacle}. Use backend=auto or torch.")
    _backend = backend
    _runs_triton.cache_clear()
    if backend == "torch":
        return "torch: asked for"
    if backend == "triton":
        return "triton: asked for"
    return f"torch: {obstacle}" if obstacle else f"triton: {torch.cuda.get_device_name()}"


def runs_triton(device: torch.device) -> bool:
    """Whether tensors on `device` are computed with by Triton kernels."""
    return _runs_triton(device.type, device.index)


@functools.cache
def _runs_triton(kind: str, index: int | None) -> bool:
    if _backend == "torch":
        return False
    if _backend == "triton" and _interpreted():
        return True
    return _obstacle(torch.device(kind if index is None else f"{kind}:{index}")) is None


def _interpreted() -> bool:
    """Triton's interpreter runs kernels on the CPU, for tests: never chosen by `auto`."""
    return _has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}, and the kernels need an NVIDIA GPU"
    if not _has_triton():
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability}, and 8.0 is needed"
    return None
