"""Compiles kernels for GPUs that this machine does not have, exactly as a launch there would.

    TRITON_INTERPRET=0 python compiled.py 90 [case ...]

A driver of ours replaces Triton's CUDA driver. It names the GPU, reads from the machine code what a
GPU would otherwise report when it loads a kernel (cuobjdump comes with Triton), and launches
nothing. The launchers run unchanged, on CPU tensors whose memory is never accessed, and every
kernel is specialized, distributed over warps and checked for shared memory as on the GPU. The
script prints one JSON object per compiled kernel.

Spilled registers are placed on the stack of a thread, and our kernels use the stack for nothing
else.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hqqtrain.quant.calibrated.fit import PARAMS
from hqqtrain.quant.quantize import quantize_weight
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import (
    Layout,
    backend,
    decode_attention_triton,
    dequantize_triton,
    feedback_triton,
    glu_triton,
    heuristics,
    linear_triton,
    rms_norm_triton,
    rotary_triton,
    weighted_fit_triton,
)
from hqqtrain_kernels.norm_params import NormParams

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448}
"""Bytes of shared memory that one program may use, by compute capability."""


@dataclass(frozen=True)
class Compiled:
    """The resources of one kernel, for one case on one GPU."""

    case: str
    kernel: str
    capability: int
    registers: int
    stack: int
    shared: int


class Driver:
    """The calls that Triton makes to a driver: name the GPU, load a kernel and launch it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self
        self.case, self.launches = "", 0
        self.loaded: list[Compiled] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.capability]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        registers, stack = _resources(binary)
        self.loaded.append(Compiled(self.case, name, self.capability, registers, stack, shared))
        module, function, max_threads = len(self.loaded), len(self.loaded), 1024
        return module, function, registers, stack, max_threads

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any) -> None:
        self.launches += 1


def _resources(binary: bytes) -> tuple[int, int]:
    """Return the registers, and the bytes of stack and local memory, of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        output = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


@triton.jit
def spills(x, size: tl.constexpr):
    """A kernel with more live values than a thread of `maxnreg` registers holds."""
    i = tl.arange(0, size)
    value = tl.load(x + i)
    tl.store(x + i, value * tl.sum(value, 0))


def _spilling() -> None:
    spills[(1,)](torch.empty(8192), size=8192, num_warps=1, maxnreg=32)


def _packed(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return W_q, scale and zero of a weight. Memory that is never accessed costs nothing."""
    meta = torch.empty(2, layout.units, layout.groups, dtype=torch.bfloat16)
    return torch.empty(layout.units, layout.unit_bytes, dtype=torch.uint8), *meta


def _dequantize(layout: Layout, dtype: torch.dtype = torch.bfloat16) -> None:
    out = torch.empty(layout.out_features, layout.in_features, dtype=dtype)
    dequantize_triton.dequantize(*_packed(layout), layout, out)


def _linear(layout: Layout, M: int) -> None:
    x = torch.empty(M, layout.in_features, dtype=torch.bfloat16)
    y = linear_triton.linear(x, *_packed(layout), None, layout)
    assert y is not None, f"{layout}, M={M}: no kernel of our own"


def _quantize(layout: Layout, solver: str, meta_dtype: torch.dtype = torch.bfloat16) -> None:
    spec = QuantSpec(layout.nbits, layout.group_size, layout.axis, solver, meta_dtype)
    quantize_weight(
        torch.zeros(layout.out_features, layout.in_features, dtype=torch.bfloat16), spec
    )


def _quantize_columns(columns: int, group_columns: int) -> None:
    W, codes = torch.empty(columns, 1, 4096), torch.empty(columns, 1, 4096, dtype=torch.uint8)
    meta = torch.empty(2, -(-columns // group_columns), 4096, dtype=torch.bfloat16)
    feedback_triton.quantize_columns(
        W, *meta, torch.empty(columns, 8192)[:, :columns], codes, torch.empty_like(W),
        nbits=4, group_columns=group_columns,
    )  # fmt: skip


def _weighted_fit(group_size: int, nbits: int, integer_zero: bool) -> None:
    weighted_fit_triton.weighted_fit(
        torch.empty(group_size, 4096), torch.empty(group_size, 1), torch.empty(4096), nbits=nbits,
        meta_dtype=torch.bfloat16, meta_min=2.0**-126, integer_zero=integer_zero, params=PARAMS,
    )  # fmt: skip


def _decode_attention(head_dim: int, mask_dtype: torch.dtype | None) -> None:
    query = torch.empty(1, 8, 4, head_dim, dtype=torch.bfloat16)
    cache = torch.empty(2, 1, 8, 512, head_dim, dtype=torch.bfloat16)
    mask = None if mask_dtype is None else torch.empty(1, 512, dtype=mask_dtype)
    decode_attention_triton.decode_attention(query, *cache, mask, 0.1)


Case = tuple[str, Callable[[], None]]


def _gated_activation(activation: str, dtype: torch.dtype) -> None:
    grad_h, gate_up = torch.empty(4, 14336, dtype=dtype), torch.empty(4, 28672, dtype=dtype)
    glu_triton.gated_activation(gate_up, activation)
    glu_triton.gated_activation_backward(grad_h, gate_up, activation, gate_up)


def _rms_norm(params: NormParams) -> None:
    x, weight = torch.empty(4, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    rms_norm_triton.forward(x, x, weight, params)
    rms_norm_triton.backward(x, x, weight, params, x)


def _rotary(inverse: bool) -> None:
    query, key = (torch.empty(1, heads, 4, 128, dtype=torch.bfloat16) for heads in (32, 8))
    cos = torch.empty(1, 4, 128, dtype=torch.bfloat16)
    rotary_triton.rotate(query, key, cos, cos, inverse)


def _cases(thorough: bool) -> Iterator[Case]:
    """Yield name and launch of every case: every kernel, or if `thorough` most of its versions."""
    yield "spills", _spilling
    for nbits in (4, 3, 8, 2, 1) if thorough else (4, 3):
        for axis in (1, 0):
            layout = Layout(28672, 8192, nbits, 64, axis)
            yield f"dequantize {layout}", partial(_dequantize, layout)
    for nbits, solver in ((4, "least_squares"), (4, "hqq"), (3, "rtn")):
        layout = Layout(4096, 256, nbits, 64, 1)
        yield f"quantize {solver} {layout}", partial(_quantize, layout, solver)
    for activation in ("silu", "gelu_tanh"):
        case = partial(_gated_activation, activation, torch.bfloat16)
        yield f"gated activation {activation}", case
    yield "norm", partial(_rms_norm, NormParams(1e-5))
    yield "rotation", partial(_rotary, False)
    yield "quantize columns", partial(_quantize_columns, 64, 64)
    yield "weighted fit", partial(_weighted_fit, 64, 2, False)
    yield "decode attention", partial(_decode_attention, 128, torch.bool)
    for nbits, heuristic in _heuristics(thorough):
        M = heuristic.max_m
        for g in (64, 128) if thorough and M <= 16 else (64,):
            rows = max(heuristic.min_out_features, heuristics.MIN_OUT_FEATURES_32)
            layout = Layout(rows, heuristic.min_in_features or 4096, nbits, g, 1)
            yield f"linear M={M} {layout}", partial(_linear, layout, M)
    layout = Layout(384, 384, 3, 12, 1)
    yield f"dequantize {layout}", partial(_dequantize, layout)
    if thorough:
        yield from _odd_cases()


def _heuristics(thorough: bool) -> Iterator[tuple[int, heuristics.Heuristic]]:
    """Yield nbits and heuristic for 8 to 2 bits; 1 bit has the same heuristics as 3."""
    for nbits, for_nbits in heuristics.HEURISTICS.items():
        for heuristic in for_nbits:
            few = heuristic.max_m in (1, 16)
            if (few or nbits > 1) if thorough else (few and nbits > 2):
                yield nbits, heuristic


def _odd_cases() -> Iterator[Case]:
    """Yield cases with unusual groups, dtypes and widths."""
    for g, axis in ((8, 1), (16, 0), (12, 0), (256, 1)):
        layout = Layout(g * 32, g * 32, 3, g, axis)
        for dtype in (torch.float32, torch.float16):
            yield f"dequantize {dtype} {layout}", partial(_dequantize, layout, dtype)
    for solver, nbits, g, axis in (
        ("hqq", 2, 64, 1),
        ("hqq", 1, 32, 1),
        ("hqq", 8, 64, 0),
        ("least_squares", 8, 8, 0),
        ("least_squares", 3, 24, 1),
        ("least_squares", 2, 128, 0),
        ("least_squares", 1, 8192, 1),
    ):
        layout = Layout(g * 8 if axis == 0 else 64, g, nbits, g, axis)
        yield f"quantize {solver} {layout}", partial(_quantize, layout, solver, torch.float32)
    for head_dim, mask_dtype in ((64, None), (256, torch.bfloat16)):
        name = f"decode attention {head_dim=} {mask_dtype}"
        yield name, partial(_decode_attention, head_dim, mask_dtype)
    for g, nbits, integer_zero in ((128, 4, False), (64, 1, True), (24, 8, False)):
        name = f"weighted fit g{g} {nbits}-bit {integer_zero=}"
        yield name, partial(_weighted_fit, g, nbits, integer_zero)


def main(capability: int, wanted: list[str]) -> None:
    """Compile the cases whose name contains one of `wanted`, or all, and print their resources."""
    fake_driver = Driver(capability)
    driver.set_active(fake_driver)
    backend.use_triton = lambda device: True
    for name, launch in _cases(thorough=capability == 90):
        if not wanted or any(word in name for word in wanted):
            fake_driver.case, launches_before = name, fake_driver.launches
            launch()
            assert fake_driver.launches > launches_before, f"{name}: no kernel was launched"
    for compiled in fake_driver.loaded:
        sys.stdout.write(json.dumps(asdict(compiled)) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
