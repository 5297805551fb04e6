"""Frozen tensors that stay in host memory and are copied to a GPU shortly before they are used.

The tensors form groups, such as those of a decoder layer. Two buffers on the GPU hold two groups:
while one is in use, the next one is copied, on a stream of its own. The order of use is expected to
go through all groups and to begin again, or to go backwards, as in a backward pass. Another order
is slower, but as correct:

- A group is only returned after the current stream waits for its copy.
- A buffer is only overwritten after the work that uses it, because the copy waits for all work that
  was queued when it was requested, and because a group is fetched again before each use.
"""

import logging
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes to which a tensor is aligned in its buffer, as by PyTorch's own allocator."""

_PORTABLE = 1
"""cudaHostRegisterPortable: the memory is pinned for all GPUs."""


class StagedTensors:
    """Groups of frozen tensors in pinned host memory, of which a device has two at a time.

    One thread at a time may use it.

    Attributes:
        copies_on_cpu: Whether tensors are also copied if the device is a CPU, which tests do.
    """

    copies_on_cpu: ClassVar[bool] = False

    def __init__(self) -> None:
        self._host: list[Tensor] = []  # the bytes of each group
        self._groups: list[list[Tensor]] = []  # the tensors of each group, views of these bytes
        self._device: torch.device | None = None
        self._slots: list[Tensor] = []
        self._held: list[int | None] = [None, None]  # the group in each buffer
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # by buffer and group
        self._current = -1
        self._stream: Any = None  # the stream that uses the current group
        self._copies: Any = None  # the stream of the copies

    def add(self, tensors: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """Copy a group of tensors into one block of host memory.

        Args:
            tensors: Contiguous tensors of any shape and dtype, on any device.

        Returns:
            The index of the group, and its tensors in host memory.
        """
        assert self._device is None, "all groups are added before the first is fetched"
        starts = [0]
        for tensor in tensors:
            starts.append(-(-(starts[-1] + tensor.nbytes) // ALIGNMENT) * ALIGNMENT)
        host = torch.empty(starts[-1], dtype=torch.uint8)
        group = _views_of(host, tensors)
        for copy, tensor in zip(group, tensors, strict=True):
            copy.copy_(tensor.detach())
        self._host.append(host)
        self._groups.append(group)
        return len(self._host) - 1, group

    def fetch(self, index: int, device: torch.device) -> list[Tensor]:
        """Return the tensors of a group on `device`, valid for work that is queued at once.

        A later call for another group may overwrite them.

        Raises:
            RuntimeError: A CUDA graph is being captured.
        """
        return _fetch(self, index, device)

    def fetch_eagerly(self, index: int, device: torch.device) -> list[Tensor]:
        """Do what `fetch` does, which hides this function from torch.compile."""
        if device.type == "cpu" and not self.copies_on_cpu:
            return self._groups[index]
        if device != self._device:
            self._allocate(device)
        stream = torch.get_device_module(device).current_stream(device)
        if index != self._current or stream != self._stream:
            self._make_current(index, stream)
        buffer = self._held.index(index)
        views = self._views.get((buffer, index))
        if views is None:
            with torch.inference_mode(False):  # autograd may save them
                views = _views_of(self._slots[buffer], self._groups[index])
            self._views[buffer, index] = views
        return views

    def _allocate(self, device: torch.device) -> None:
        """Pin the host memory, and allocate two buffers on `device`."""
        module, size = torch.get_device_module(device), max(host.nbytes for host in self._host)
        if device.type == "cuda" and self._device is None:
            pinned = [host for host in self._host if _pin(host)]
            if len(pinned) < len(self._host):
                logger.warning("host memory cannot be pinned, so copies to the GPU are slower")
            weakref.finalize(self, _unpin, pinned, device).atexit = False
        self._device, self._stream = device, None
        self._copies = module.Stream(device) if device.type == "cuda" else module.Stream()
        with torch.inference_mode(False):
            self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        if device.type == "cuda":
            for buffer in self._slots:  # a copy may be in flight when they are freed
                buffer.record_stream(self._copies)
        self._held, self._current = [None, None], -1
        self._views.clear()

    def _make_current(self, index: int, stream: Any) -> None:
        """Let `stream` use a group, and request the copy of the group that is expected next."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "weights that stay in host memory cannot be part of a CUDA graph; turn offloading "
                "or the compilation off."
            )
        if self._stream is not None and stream != self._stream:
            self._copies.wait_stream(self._stream)
        if index not in self._held:
            in_use = self._held.index(self._current) if self._current in self._held else 1
            self._copy(index, 1 - in_use, stream)
        stream.wait_stream(self._copies)
        is_backward = index == self._current - 1
        self._current, self._stream = index, stream
        following = (index - 1 if is_backward and index > 0 else index + 1) % len(self._host)
        if following not in self._held:
            self._copy(following, 1 - self._held.index(index), stream)

    def _copy(self, index: int, buffer: int, stream: Any) -> None:
        """Queue the copy of a group into a buffer, after all work of `stream` up to now."""
        host = self._host[index]
        self._copies.wait_stream(stream)
        with torch.get_device_module(self._device).stream(self._copies), torch.no_grad():
            self._slots[buffer][: len(host)].copy_(host, non_blocking=True)
        self._held[buffer] = index

    def __deepcopy__(self, memo: dict) -> "StagedTensors":
        """Return itself: the tensors are frozen, so the layers of a copied model share them."""
        return self


@torch.compiler.disable
def _fetch(staged: StagedTensors, index: int, device: torch.device) -> list[Tensor]:
    return staged.fetch_eagerly(index, device)


def _views_of(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of `memory` [bytes], uint8, with the shapes and dtypes of the tensors `like`."""
    views, start = [], 0
    for tensor in like:
        part = memory[start : start + tensor.nbytes]
        views.append(part.view(tensor.dtype).view(tensor.shape))
        start = -(-(start + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
    return views


def _pin(host: Tensor) -> bool:
    """Pin the memory of a tensor in place; return whether the system allows it.

    PyTorch's allocator of pinned memory would round the size up to a power of two.
    """
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, _PORTABLE)) == 0:
        return True
    with suppress(RuntimeError):  # CUDA would report the error again, at the next kernel
        torch.zeros(1, device="cuda")
    return False


def _unpin(pinned: list[Tensor], device: torch.device) -> None:
    """Make memory pageable again after all copies from it, before it is freed."""
    torch.cuda.synchronize(device)
    runtime: Any = torch.cuda.cudart()
    for host in pinned:
        runtime.cudaHostUnregister(host.data_ptr())
