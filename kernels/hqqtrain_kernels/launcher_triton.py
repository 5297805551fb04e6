"""Repeated kernel launches at a few microseconds of Python each.

Triton's own launcher inspects every argument at every launch, because it compiles another version
of the kernel for integers that 16 divides, for ones, and for unaligned pointers. Kernels launched
here declare their integers `do_not_specialize`, and receive what they need to know about them as
constexprs. The dtypes of the tensors then determine the compiled kernel.

On an H200's host a launch takes 9 us instead of 17. This was measured with a launch by
`CompiledKernel.__getitem__`. Now the kernel's own `run` is called, as that method does, but without
the hooks of Triton's profiler, which cost another 1.3 us even if no profiler runs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels on the CPU.

Its bf16 products are wrong, so kernels multiply in fp32 there.
"""
MAX_REGISTERS = 255
"""`maxnreg` per thread. Without it ptxas may pick 128 or 168 by rules of its own, and spill."""

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""Triton's names of dtypes, for constexprs."""

_ALIGNMENT = 16
"""Alignment in bytes that Triton assumes of a pointer once it has seen it aligned."""

Grid = tuple[int, int, int]


class CachedKernel:
    """One kernel with its constexprs and compile options, which remembers its compiled versions.

    Args:
        kernel: A `@triton.jit` function. Its parameters are tensors (or None), then integers below
            2**31, then constexprs.
        constants: Its constexprs by name, in the order of its parameters.
        options: Triton's compile options: `num_warps`, `num_stages`, `maxnreg` ...
            `enable_fp_fusion` allows the compiler to fuse a product and a sum, which then round
            once. Results depend on it, so it is always set: here it is True by default, but
            Triton's default changes from True to False with 3.10. A kernel with a constexpr PDL
            that is true is launched with `launch_pdl`.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: int | bool) -> None:
        self._kernel, self._constants = kernel, constants
        self._options = {"enable_fp_fusion": True, **options}
        if constants.get("PDL"):
            self._options["launch_pdl"] = True
        self._constant_values = tuple(constants.values())
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def launch(
        self, grid: Grid, tensors: dict[str, Tensor | None], integers: dict[str, int]
    ) -> None:
        """Launch on the device of the first tensor, on its current stream.

        Args:
            grid: Programs along each dimension.
            tensors: Tensor arguments by name, in the order of the parameters. The first is not
                None.
            integers: Integer arguments by name, in the order of the parameters.
        """
        first_tensor = next(iter(tensors.values()))
        assert first_tensor is not None
        device = first_tensor.get_device()
        if first_tensor.is_cuda and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(device, grid, tensors, integers)
        else:
            self._launch(device, grid, tensors, integers)

    def _launch(
        self,
        device: int,
        grid: Grid,
        tensors: dict[str, Tensor | None],
        integers: dict[str, int],
    ) -> None:
        pointers: list[int | None] = []
        key: list[Any] = [device]
        address_bits = 0
        for tensor in tensors.values():
            pointer = None if tensor is None else tensor.data_ptr()
            pointers.append(pointer)
            address_bits |= pointer or 0
            key.append(tensor if tensor is None else tensor.dtype)
        # One unaligned pointer selects another version of the kernel: leave that to Triton.
        aligned = address_bits % _ALIGNMENT == 0
        compiled = self._compiled.get(tuple(key)) if aligned else None
        if compiled is None:
            self._compile_and_launch(tuple(key) if aligned else None, grid, tensors, integers)
            return
        run, function, metadata, _ = compiled
        stream = driver.active.get_current_stream(device)
        hooks = (None, None, None)
        values = (*pointers, *integers.values(), *self._constant_values)
        run(*grid, stream, function, metadata, *hooks, *values)

    def _compile_and_launch(
        self,
        key: tuple[Any, ...] | None,
        grid: Grid,
        tensors: dict[str, Tensor | None],
        integers: dict[str, int],
    ) -> None:
        """Launch through Triton, and remember the compiled kernel under `key`."""
        arguments = {**tensors, **integers, **self._constants}
        # Later launches pass the values by position.
        assert list(arguments) == self._kernel.arg_names, f"{self._kernel}: {list(arguments)}"
        compiled = self._kernel[grid](**arguments, **self._options)
        if key is not None and compiled is not None:  # the interpreter compiles nothing
            # Keep `compiled` alive: it unloads the kernel when it is destroyed.
            self._compiled[key] = (
                compiled.run,
                compiled.function,
                compiled.packed_metadata,
                compiled,
            )
