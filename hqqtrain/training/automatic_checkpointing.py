"""`train.activation_checkpointing=auto` on a GPU: recompute as few layers as its memory needs.

The first step measures: all decoder layers but the last recompute. The last one shows what a layer
keeps if it does not, which the peak hardly notices: a last layer that recomputes needs the same
tensors at the start of the backward pass. Every further layer that keeps its activations adds these
to the peak, and saves its input.
"""

import logging
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.runtime import reset_recent_peak
from hqqtrain.training.activation_checkpointing import recompute_first

logger = logging.getLogger(__name__)

RESERVE = 0.1
"""Fraction of the usable memory that stays free: for fragments, and for what is not measured."""


class DeviceMemory(Protocol):
    """The memory of a device, in bytes."""

    def allocated(self) -> int:
        """Return the bytes of all tensors."""

    def peak(self) -> int:
        """Return the largest `allocated` since `reset_peak`."""

    def reset_peak(self) -> None:
        """Forget the peak so far."""

    def usable(self) -> int:
        """Return the largest `allocated` that this process could reach."""


class GPUMemory:
    """Implements `DeviceMemory` for PyTorch's allocator of a GPU.

    Args:
        device: The GPU; without an index, the current one.
    """

    def __init__(self, device: torch.device) -> None:
        # PyTorch 2.11 finds the memory fraction of a device with an index only.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device(device.type, index)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        reset_recent_peak(self._device)

    def usable(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        limit = int(total * torch.cuda.get_per_process_memory_fraction(self._device))
        return min(free + torch.cuda.memory_reserved(self._device), limit)


class AutomaticCheckpointing:
    """Decides after the first step how many decoder layers recompute.

    Args:
        layers: The decoder layers in their order, from `checkpointed_layers`; all recompute.
        memory: The memory of this rank's device.
        comm: All ranks, which get the same number.
        max_tokens: Largest number of tokens in a micro-batch, padding included. The measurement is
            scaled to it, because the batches of the first step may be shorter.
    """

    def __init__(
        self, layers: list[nn.Module], memory: DeviceMemory, comm: Communicator, max_tokens: int
    ) -> None:
        self._layers, self._memory, self._comm = layers, memory, comm
        self._max_tokens, self._is_decided = max_tokens, False
        recompute_first(layers, len(layers) - 1)
        self._before = memory.allocated()
        self._probe = _Probe(layers[-1], memory)

    def after_step(self) -> None:
        """Decide, if a step has been taken for the first time. Collective on that call."""
        if self._is_decided:
            return
        self._is_decided = True
        self._probe.remove()
        peak, reserve = self._scaled_peak(), int(self._memory.usable() * RESERVE)
        free = self._memory.usable() - reserve - peak
        kept_by_layer, saved_input = self._scaled(self._probe.kept), self._scaled(self._probe.input)
        per_layer = kept_by_layer - saved_input
        kept = max(0, 1 + free // per_layer) if per_layer > 0 else 0
        number = max(self._comm.all_gather_object(max(0, len(self._layers) - kept)))
        recompute_first(self._layers, number)
        if self._comm.is_main:
            peak += per_layer * (len(self._layers) - number - 1)
            logger.info(
                "train.activation_checkpointing=auto: %d of %d decoder layers recompute; each of "
                "the others keeps %.3g GiB, and the peak is about %.3g of %.3g GiB",
                number, len(self._layers), kept_by_layer / 2**30, peak / 2**30,
                self._memory.usable() / 2**30,
            )  # fmt: skip

    def remove(self) -> None:
        """Stop measuring."""
        self._probe.remove()

    def _scaled_peak(self) -> int:
        """Return the peak of a later step on full batches, with the state of the optimizer."""
        state = max(0, self._memory.allocated() - self._before)
        return self._before + state + self._scaled(self._memory.peak() - self._before)

    def _scaled(self, nbytes: int) -> int:
        """Return the bytes that `nbytes` of the measured batches are in a full batch."""
        return int(nbytes * max(1.0, self._max_tokens / max(1, self._probe.tokens)))


class _Probe:
    """Measures what the last layer keeps in the longest micro-batch so far.

    Attributes:
        kept: Bytes of what its forward pass has left in memory.
        input: Bytes of its input, which has the size of its output.
        tokens: Tokens of the micro-batch, padding included.
    """

    def __init__(self, layer: nn.Module, memory: DeviceMemory) -> None:
        self.kept = self.input = self.tokens = 0
        self._memory, self._allocated, self._is_first = memory, 0, True
        # The hooks run inside of those of FSDP2, which gather and free the parameters of the layer.
        self._hooks = (
            layer.register_forward_pre_hook(self._enter),
            layer.register_forward_hook(self._leave, prepend=True),
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, layer: nn.Module, inputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if self._is_first:  # an evaluation before the training may have had a higher peak
            self._memory.reset_peak()
            self._is_first = False
        self._allocated = self._memory.allocated()

    def _leave(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        tokens = hidden.shape[:-1].numel()
        if torch.is_grad_enabled() and tokens > self.tokens:
            self.tokens, self.input = tokens, hidden.nbytes
            self.kept = self._memory.allocated() - self._allocated
