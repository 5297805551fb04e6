"""The inputs of checkpointed layers in pinned host memory, copied while other layers compute.

With 80 decoder layers and inputs of 2,048 x 8,192 in bf16, this frees 2.5 GiB on the GPU. An input
is copied to the host on a stream of its own during the forward pass of its layer, and back during
the backward pass of the layer after it. The GPU holds two inputs at a time: the one of the current
layer, and the one that is copied. Pinned memory is used again in each pass.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

MIN_NUMEL = 1 << 18
"""Elements of the smallest tensor that is offloaded; smaller ones stay on the GPU."""

_ON_DEVICE = 2
"""Number of inputs that may be on the GPU during a forward pass."""


class OffloadedInputs:
    """Hooks for saved tensors that offload them; they are needed again in the reverse order.

    Another order is slower, but as correct. All copies run on one stream, so a buffer of the host
    may be filled again as soon as the copy from it has been requested.

    Attributes:
        copies_on_cpu: Whether tensors of a CPU are offloaded, too, which tests do.
    """

    copies_on_cpu = False

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # buffers of the host, uint8
        self._latest: list[_HostCopy] = []  # the inputs that are still on the device
        self._streams: dict[torch.device, Any] = {}

    def pack(self, tensor: Tensor) -> "Tensor | _HostCopy":
        """Return what autograd saves in place of `tensor`: itself, or its copy on the host."""
        is_offloaded = tensor.is_cuda or self.copies_on_cpu
        if not is_offloaded or tensor.numel() < MIN_NUMEL or not tensor.is_contiguous():
            return tensor
        while len(self._latest) >= _ON_DEVICE:
            self._latest.pop(0).release()
        previous = self._latest[-1] if self._latest else None
        self._latest.append(_HostCopy(self, tensor, previous))
        return self._latest[-1]

    def unpack(self, saved: "Tensor | _HostCopy") -> Tensor:
        """Return the tensor that `pack` was given, and request the copy of the one before it."""
        if isinstance(saved, Tensor):
            return saved
        if saved in self._latest:
            self._latest = self._latest[: self._latest.index(saved)]
        tensor = saved.fetch()
        if previous := saved.previous():
            previous.prefetch()
        return tensor

    def stream(self, device: torch.device) -> Any:
        """Return the stream of all copies from and to `device`."""
        if device not in self._streams:
            self._streams[device] = torch.get_device_module(device).Stream()
        return self._streams[device]

    def take_buffer(self, nbytes: int) -> Tensor:
        """Return a buffer of the host of at least `nbytes` bytes, uint8 [bytes]."""
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.nbytes < nbytes:  # batches differ in length
            pinned = torch.cuda.is_available()
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return buffer

    def return_buffer(self, buffer: Tensor) -> None:
        """Take back a buffer whose copies have all been requested."""
        self._free.append(buffer)


class _HostCopy:
    """The copy of one input. It is on the device, too, until `release`, and from `prefetch` on.

    Attributes:
        previous: Returns the input that was saved before this one, which is needed after it; None
            if there is none, or if its pass has ended.
    """

    def __init__(
        self, owner: OffloadedInputs, tensor: Tensor, previous: "_HostCopy | None"
    ) -> None:
        self.previous = weakref.ref(previous) if previous else lambda: None
        self._owner, self._device = owner, tensor.device
        self._shape, self._dtype = tensor.shape, tensor.dtype
        self._stream = owner.stream(tensor.device)
        self._buffer = owner.take_buffer(tensor.nbytes)
        self._on_device: Tensor | None = tensor.detach()
        self._stream.wait_stream(self._current_stream())  # which computes the tensor
        self._copy(self._host(), self._on_device)

    def release(self) -> None:
        """Free the tensor on the device, after the copy to the host."""
        if self._on_device is not None:
            self._current_stream().wait_event(self._copied)
            self._on_device = None

    def prefetch(self) -> None:
        """Request the copy to the device, after the work that is queued now."""
        if self._on_device is not None:
            return
        # Memory of the current stream, which other work of this stream may still use.
        self._on_device = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._stream.wait_stream(self._current_stream())
        self._copy(self._on_device, self._host())

    def fetch(self) -> Tensor:
        """Return the tensor on the device, for work that is queued from now on."""
        self.prefetch()
        tensor, self._on_device = self._on_device, None
        assert tensor is not None
        self._current_stream().wait_event(self._copied)
        return tensor

    def _host(self) -> Tensor:
        nbytes = self._shape.numel() * self._dtype.itemsize
        return self._buffer[:nbytes].view(self._dtype).view(self._shape)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with torch.get_device_module(self._device).stream(self._stream), torch.no_grad():
            target.copy_(source, non_blocking=True)
            self._copied = self._stream.record_event()

    def _current_stream(self) -> Any:
        return torch.get_device_module(self._device).current_stream(self._device)

    def __del__(self) -> None:
        self.release()  # before the memory on the device is used again
        self._owner.return_buffer(self._buffer)
