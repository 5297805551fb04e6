"""The Python overhead of a call, measured on a layer so small that nothing waits for the GPU.

It is the wall time of calls without synchronization, less that of `F.linear` on the same shapes.
Two sizes are measured: M=1, where a fused kernel may run, and M=512, where the weight is
dequantized.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import hqqtrain_kernels as kernels
import peers
from peers import GROUP_SIZE, Layer
from record import Row, attempt
from sizes import Sizes
from timing import Call, Limits, host_medians

BASELINE, NBITS = "F.linear", 4
PEERS = {"bitsandbytes nf4": peers.bitsandbytes_nf4, "hqq": peers.hqq_pytorch}


def rows(sizes: Sizes, limits: Limits) -> Iterator[Row]:
    """Measure without autograd, forward with autograd, and forward and backward."""
    W = torch.randn(sizes.tiny, device=sizes.device, dtype=torch.bfloat16)
    layers = _ours(W)
    for name, make in PEERS.items():
        layer, fault = attempt(lambda make=make: make(W, NBITS))
        if layer is None:
            yield _row(sizes, "overhead", name, note=fault)
        else:
            layers[name] = layer
    for M in (1, 512):
        for what in WAYS:
            yield from _measure(sizes, layers, M, what)


def _measure(sizes: Sizes, layers: dict[str, Layer], M: int, what: str) -> Iterator[Row]:
    x = torch.randn(M, sizes.tiny[1], device=sizes.device, dtype=torch.bfloat16)
    calls: dict[str, Call] = {}
    for provider, layer in layers.items():
        call, fault = attempt(lambda layer=layer: _called(WAYS[what](layer, x)))
        if call is None:
            yield _row(sizes, f"{what} M={M}", provider, note=fault)
        else:
            calls[provider] = call
    milliseconds = host_medians(calls, sizes.device, 3 * sizes.rounds)
    for provider, ms in milliseconds.items():
        more = f"{1e3 * (ms - milliseconds[BASELINE]):+.1f} us"
        yield _row(sizes, f"{what} M={M}", provider, ms, ms / milliseconds[BASELINE], more)


def _called(call: Call) -> Call:
    """Call once, so that an error shows, and return the call."""
    call()
    return call


def _ours(W: Tensor) -> dict[str, Layer]:
    """Return the operator and `F.linear`, and the modules around them."""
    dense, layer = peers.cublas(W, NBITS), peers.ours(W, NBITS)
    weight, parts = dense.weight, (layer.W_q, layer.scale, layer.zero)
    return {
        BASELINE: lambda x: F.linear(x, weight),
        "ours": lambda x: kernels.linear(x, *parts, None, layer.layout, torch.bfloat16),
        "nn.Linear": dense,
        "ours, module": layer,
    }


def _inference(layer: Layer, x: Tensor) -> Call:
    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def _recorded(layer: Layer, x: Tensor) -> Call:
    x = x.clone().requires_grad_()
    return lambda: layer(x)


def _both(layer: Layer, x: Tensor) -> Call:
    x = x.clone().requires_grad_()
    grad = torch.randn_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), x, grad)


WAYS: dict[str, Callable[[Layer, Tensor], Call]] = {
    "no_grad": _inference, "forward with autograd": _recorded, "forward+backward": _both,
}  # fmt: skip


def _row(
    sizes: Sizes, what: str, provider: str, ms: float | None = None, ratio: float | None = None,
    note: str = "",
) -> Row:  # fmt: skip
    shape, baseline = "x".join(map(str, sizes.tiny)), BASELINE if ratio else ""
    return Row("overhead", what, shape, provider, NBITS, GROUP_SIZE, 1, ms, baseline, ratio,
               note=note)  # fmt: skip
