"""Speed and memory of quantizing Llama-70B's largest weight, compared with hqq's quantizer."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hqqtrain.quant.error import relative_error
from hqqtrain.quant.quantize import (
    QuantizedWeight,
    dequantize_weight,
    quantize_async,
    quantize_weight,
)
from hqqtrain.quant.spec import QuantSpec
from record import Row, attempt
from sizes import Sizes
from timing import Call, Limits, medians

LLAMA_70B = 68.45e9
"""Weights in the linear layers of Llama-70B: measured times are scaled to it."""
GROUP_SIZE = 64
SOLVERS = ("hqq", "least_squares", "rtn")
BASELINE, MEMORY = "hqq", "peak memory"


def normal(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return a weight with a common distribution: Gaussian, standard deviation 0.02."""
    return torch.randn(shape, device=device).mul_(0.02).to(torch.bfloat16)


def heavy_tailed(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return Student's t with 3 degrees of freedom, scaled to the same standard deviation."""
    chi_square = sum(torch.randn(shape, device=device).square_() for _ in range(3))
    t = torch.randn(shape, device=device).div_((chi_square / 3).sqrt_())
    return t.mul_(0.02 / 3**0.5).to(torch.bfloat16)


WEIGHTS: dict[str, Callable[[tuple[int, int], torch.device], Tensor]] = {
    "normal": normal, "heavy-tailed": heavy_tailed,
}  # fmt: skip


def rows(sizes: Sizes, limits: Limits) -> Iterator[Row]:
    """Measure speed for both kinds of weights, then memory."""
    for kind, make in WEIGHTS.items():
        W = make(sizes.weight, sizes.device)
        for nbits in (4, 2):
            for axis in (1, 0):
                yield from _speed(sizes, limits, W, kind, nbits, axis)
    for nbits in (4, 2):
        yield from _memory(sizes, W, nbits)


def _speed(
    sizes: Sizes, limits: Limits, W: Tensor, kind: str, nbits: int, axis: int
) -> Iterator[Row]:
    what = f"quantize {kind}"
    shared = {"nbits": nbits, "group_size": GROUP_SIZE, "axis": axis}
    specs = {f"ours, {solver}": _spec(nbits, axis, solver) for solver in SOLVERS}
    errors = {name: _error(W, spec) for name, spec in specs.items()}
    calls = {name: _ours(W, spec) for name, spec in specs.items()}
    theirs, error_message = attempt(lambda: _theirs(W, nbits, axis))
    if theirs is None:
        yield Row("quantize", what, sizes.shape, BASELINE, **shared, note=error_message)
    else:
        calls[BASELINE], errors[BASELINE] = theirs
    milliseconds = medians(calls, sizes.device, sizes.rounds)
    hqq_ms, llama_70b_s_per_ms = milliseconds.get(BASELINE), LLAMA_70B / W.numel() / 1e3
    least_ms = limits.ms(W.nbytes + W.numel() * (nbits / 8 + 4 / GROUP_SIZE))
    for provider, ms in milliseconds.items():
        note = f"70B: {ms * llama_70b_s_per_ms:.3f} s; relative error {errors[provider]:.4g}"
        ratio = ms / hqq_ms if hqq_ms else None
        yield Row("quantize", what, sizes.shape, provider, **shared, ms=ms, share=least_ms / ms,
                  baseline=BASELINE if hqq_ms else "", ratio=ratio, note=note)  # fmt: skip


def _spec(nbits: int, axis: int, solver: str) -> QuantSpec:
    return QuantSpec(nbits, GROUP_SIZE, axis, solver, torch.bfloat16)


def _ours(W: Tensor, spec: QuantSpec) -> Call:
    """Quantize as for a model, where a later check asks whether the weight was finite."""
    return lambda: quantize_async(W, spec)


def _error(W: Tensor, spec: QuantSpec) -> float:
    return relative_error(
        W, dequantize_weight(quantize_weight(W, spec), spec.layout(*W.shape), torch.float32)
    )


def _theirs(W: Tensor, nbits: int, axis: int) -> tuple[Call, float]:
    """Return hqq's own quantizer and its error, called once so that an exception shows here."""
    from hqq.core.quantize import Quantizer

    def call() -> tuple[Tensor, dict]:
        return Quantizer.quantize(
            W, nbits=nbits, group_size=GROUP_SIZE, axis=axis, optimize=True, bitpack=True,
            round_zero=nbits == 4, compute_dtype=torch.bfloat16, device=str(W.device),
        )  # fmt: skip

    return call, relative_error(W, Quantizer.dequantize(*call()))


def _memory(sizes: Sizes, W: Tensor, nbits: int) -> Iterator[Row]:
    """Measure the peak while quantizing, as a multiple of weight and result together."""
    for solver in SOLVERS:
        spec, name = _spec(nbits, 1, solver), f"ours, {solver}"
        ratio, note = _peak(W, lambda spec=spec: _stored(quantize_weight(W, spec)))
        yield Row("quantize", MEMORY, sizes.shape, name, nbits, GROUP_SIZE, 1,
                  baseline="weight + result", ratio=ratio, note=note)  # fmt: skip
    theirs, error_message = attempt(lambda: _theirs(W, nbits, 1)[0])
    ratio, note = _peak(W, lambda: _bytes(theirs())) if theirs else (None, error_message)
    yield Row("quantize", MEMORY, sizes.shape, BASELINE, nbits, GROUP_SIZE, 1,
              baseline="weight + result", ratio=ratio, note=note)  # fmt: skip


def _peak(W: Tensor, run: Callable[[], int]) -> tuple[float | None, str]:
    """Return the peak memory of `run`, which quantizes W and returns the bytes of the result."""
    if W.device.type != "cuda":
        return None, "memory is measured on a GPU only"
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated() - W.nbytes
    torch.cuda.reset_peak_memory_stats()
    result = run()
    peak = torch.cuda.max_memory_allocated() - others
    return peak / (W.nbytes + result), f"peak {peak / 2**30:.3f} GiB"


def _stored(quantized: QuantizedWeight) -> int:
    return sum(part.nbytes for part in (quantized.W_q, quantized.scale, quantized.zero))


def _bytes(result: tuple[Tensor, dict]) -> int:
    W_q, meta = result
    return W_q.nbytes + sum(part.nbytes for part in meta.values() if isinstance(part, Tensor))
