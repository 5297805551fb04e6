"""Dequantization of whole weights, compared with a device copy that moves as many bytes."""

import collections
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

import hqqtrain_kernels as kernels
from hqqtrain.quant.quantize import quantize_weight
from hqqtrain.quant.spec import QuantSpec
from record import Row, attempt
from sizes import Sizes
from timing import Call, Limits, copies_beyond_cache, medians

GROUP_SIZE = 64
BASELINE = "copy"
NBITS = (8, 4, 3, 2, 1)


def rows(sizes: Sizes, limits: Limits) -> Iterator[Row]:
    """Measure every nbits and output size on axis 1; axis 0 and hqq's own for the largest."""
    for shape in sizes.outputs:
        W = torch.randn(shape, device=sizes.device).mul_(0.02).to(torch.bfloat16)
        for nbits in NBITS:
            for axis in (1, 0) if shape == sizes.weight else (1,):
                yield from _measure(sizes, W, nbits, axis)


def _measure(sizes: Sizes, W: Tensor, nbits: int, axis: int) -> Iterator[Row]:
    shared = {"nbits": nbits, "group_size": GROUP_SIZE, "axis": axis}
    what, shape = "dequantize", "x".join(map(str, W.shape))
    spec = QuantSpec(nbits, GROUP_SIZE, axis, "rtn", torch.bfloat16)
    quantized, layout = quantize_weight(W, spec), spec.layout(*W.shape)
    packed = quantized.W_q, quantized.scale, quantized.zero
    moved_bytes = W.nbytes + sum(part.nbytes for part in packed)
    copies = copies_beyond_cache(moved_bytes, W.device)
    calls = {
        BASELINE: _copy(moved_bytes // 2, copies, W.device),
        "ours": _ours(packed, layout, copies),
    }
    if W.shape == sizes.weight:
        theirs, fault = attempt(lambda: _theirs(W, nbits, axis))
        if theirs is None:
            yield Row("dequantize", what, shape, "hqq", **shared, note=fault)
        else:
            calls["hqq"] = theirs
    milliseconds = medians(calls, W.device, sizes.rounds)
    for provider, ms in milliseconds.items():
        share = milliseconds[BASELINE] / ms
        note = f"{moved_bytes / ms / 1e9:.3f} TB/s"
        yield Row("dequantize", what, shape, provider, **shared, ms=ms, share=share,
                  baseline=BASELINE, ratio=1 / share, note=note)  # fmt: skip


def _copy(size: int, copies: int, device: torch.device) -> Call:
    """Return a call that reads `size` bytes and writes as many."""
    pairs = torch.randint(0, 256, (copies, 2, size), dtype=torch.uint8, device=device)
    rotation = itertools.cycle(pairs)

    def call() -> None:
        source, target = next(rotation)
        target.copy_(source)

    return call


def _ours(packed: tuple[Tensor, ...], layout: kernels.Layout, copies: int) -> Call:
    """Return a call of the public operator.

    Results stay alive until `copies` newer ones exist. Otherwise the allocator would reuse memory
    that is still in the cache.
    """
    rotation = itertools.cycle([tuple(part.clone() for part in packed) for _ in range(copies)])
    results: collections.deque[Tensor] = collections.deque(maxlen=copies)
    return lambda: results.append(kernels.dequantize(*next(rotation), layout, torch.bfloat16))


def _theirs(W: Tensor, nbits: int, axis: int) -> Call:
    """Return a call of hqq's own, called once here so that an error shows."""
    from hqq.core.quantize import Quantizer

    W_q, meta = Quantizer.quantize(
        W, nbits=nbits, group_size=GROUP_SIZE, axis=axis, optimize=False, bitpack=True,
        compute_dtype=torch.bfloat16, device=str(W.device),
    )  # fmt: skip
    Quantizer.dequantize(W_q, meta)
    return lambda: Quantizer.dequantize(W_q, meta)
