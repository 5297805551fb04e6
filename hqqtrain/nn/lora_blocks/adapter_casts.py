"""The LoRA matrices of all blocks in the dtype of the products, cast once per step.

Adapters are mostly fp32 and products bf16. A cast for each call of a block is a kernel of 16 us for
a few small matrices; it was 0.7 % of a step of an 8B model whose layers recompute (H200). All
matrices together are one kernel. They change between steps only, which only the trainer knows:
fused and 8-bit AdamW step without a new version of a tensor, and FSDP2 gathers new values into the
same memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hqqtrain.compat import copy_tensors
from hqqtrain.nn.lora_blocks.adapted_linear import AdaptedLinear
from hqqtrain.nn.lora_blocks.products import Adapters, new_adapters


class AdapterCasts:
    """Casts the matrices of all groups of linears that share an input, when the first is needed."""

    def __init__(self) -> None:
        self._groups: list[tuple[AdaptedLinear, ...]] = []
        self._cast: dict[int, Adapters] | None = None
        self._dtype: torch.dtype | None = None
        self._is_open = False

    def add(self, linears: Sequence[AdaptedLinear]) -> int:
        """Return the number of a new group."""
        self._groups.append(tuple(linears))
        return len(self._groups) - 1

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Make the context of a step: until it ends, no adapter changes."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open, self._cast = False, None

    def get(self, group: int, dtype: torch.dtype) -> Adapters | None:
        """Return the matrices of a group in `dtype`; None if each call has to cast them.

        That is the case outside of the context, and for sharded parameters, of which FSDP2 has one
        layer at a time.
        """
        if not self._is_open:
            return None
        if self._cast is None:
            self._cast, self._dtype = self._cast_all(dtype), dtype
        return self._cast.get(group) if dtype == self._dtype else None

    @torch.no_grad()
    def _cast_all(self, dtype: torch.dtype) -> dict[int, Adapters]:
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        cast = {}
        for group, linears in enumerate(self._groups):
            A, B = [linear.A for linear in linears], [linear.B for linear in linears]
            if all(map(_is_whole, (*A, *B))):
                scalings = tuple(linear.scaling for linear in linears)
                cast[group], copies = new_adapters(A, B, scalings, dtype)
                targets += copies.targets
                sources += copies.sources
        if targets:
            copy_tensors(targets, sources)
        return cast


def _is_whole(param: Tensor) -> bool:
    """Whether a parameter has all its values here; ZeRO-3 leaves an empty tensor."""
    return not isinstance(param, DTensor) and param.numel() > 0
