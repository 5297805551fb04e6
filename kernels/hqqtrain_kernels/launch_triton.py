"""Launching a kernel again at a few microseconds of Python.

Triton's own launch looks at every argument each time, because it compiles a kernel anew for
numbers that 16 divides, for ones, for unaligned pointers. Kernels launched here declare their
numbers `do_not_specialize` and take what they need to know of them as constants; then the dtypes
say which compiled kernel it is. On an H200's host 9 us instead of 17, while it was still launched
by `CompiledKernel.__getitem__`; its own `run` is called now, as that does, but without the hooks
of Triton's profiler, which cost 1.3 us more even where nobody profiles.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Kernels run in Python on the CPU, where bf16 products are wrong and run on fp32 instead."""

MOST_REGISTERS = 255
"""Of a thread, as an option of a `Variant`: told nothing, ptxas may choose 128 or 168 by rules of
its own, and spill a few."""

_ALIGNMENT = 16

Grid = tuple[int, int, int]
Tensors = tuple[Tensor | None, ...]
Numbers = tuple[int, ...]


class Variant:
    """One kernel with its constants, and how it is cut: `num_warps`, `num_stages`.

    The kernel takes tensors (or None), then numbers below 2**31, then the constants in order.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: int) -> None:
        self._kernel, self._constants, self._options = kernel, constants, options
        self._values = tuple(constants.values())
        self._runs: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def launch(self, grid: Grid, tensors: Tensors, numbers: Numbers) -> None:
        """Runs on the device of the first tensor, on its current stream."""
        first = tensors[0]
        assert first is not None
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                self._launch(first.get_device(), grid, tensors, numbers)
        else:
            self._launch(first.get_device(), grid, tensors, numbers)

    def _launch(self, device: int, grid: Grid, tensors: Tensors, numbers: Numbers) -> None:
        pointers: list[int | None] = []
        key: list[Any] = [device]
        bits = 0
        for tensor in tensors:
            pointer = None if tensor is None else tensor.data_ptr()
            pointers.append(pointer)
            bits |= pointer or 0
            key.append(tensor if tensor is None else tensor.dtype)
        aligned = bits % _ALIGNMENT == 0
        known = self._runs.get(tuple(key)) if aligned else None
        if known is not None:
            run, function, metadata, _ = known
            stream = driver.active.get_current_stream(device)
            hooks = (None, None, None)
            run(*grid, stream, function, metadata, *hooks, *pointers, *numbers, *self._values)
            return
        compiled = self._kernel[grid](*tensors, *numbers, **self._constants, **self._options)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            # With `compiled` itself, which unloads the kernel at its end.
            told = (compiled.function, compiled.packed_metadata)
            self._runs[tuple(key)] = (compiled.run, *told, compiled)
