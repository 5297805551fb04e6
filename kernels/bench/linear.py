"""One linear layer, forward and backward to the input, compared with cuBLAS and the peers."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import peers
from peers import GROUP_SIZE, Layer
from record import Row, attempt
from sizes import Sizes
from timing import Call, Limits, copies_beyond_cache, medians

BASELINE = "cuBLAS bf16"
PROVIDERS: dict[str, Callable[[Tensor, int], Layer]] = {
    BASELINE: peers.cublas,
    "ours": peers.ours,
    "ours, dequantize + cuBLAS": peers.ours_dequantized,
    "bitsandbytes nf4": peers.bitsandbytes_nf4,
    "hqq": peers.hqq_pytorch,
    "gemlite": peers.gemlite,
}
FORWARD, BOTH = "forward", "forward+backward"
INFERENCE_ONLY = ("ours, dequantize + cuBLAS", "gemlite")
GEMLITE_MAX_ROWS = 128
"""Most rows of input for gemlite: it tunes each size for some 7 s, and is slower from 128 on."""


def rows(sizes: Sizes, limits: Limits) -> Iterator[Row]:
    """Measure every batch size, forward and with backward, at 4 and 2 bits."""
    W = torch.randn(sizes.weight, device=sizes.device).mul_(0.02).to(torch.bfloat16)
    for nbits in (4, 2):
        copies = copies_beyond_cache(W.numel() * nbits // 8, sizes.device)
        layers, errors = _make_layers(W, nbits, copies)
        for provider, error in errors.items():
            yield _row(sizes, nbits, "linear", provider, note=error)
        for M in sizes.batches:
            for what in (FORWARD, BOTH):
                yield from _measure(sizes, limits, layers, nbits, M, what)
        del layers


def _make_layers(
    W: Tensor, nbits: int, copies: int
) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """Make the layers of every provider, and return the errors of those that fail."""
    layers, errors = {}, {}
    for provider, make in PROVIDERS.items():
        provider_layers, error = attempt(lambda make=make: [make(W, nbits) for _ in range(copies)])
        if provider_layers is None:
            errors[provider] = error
        else:
            layers[provider] = provider_layers
    return layers, errors


def _measure(
    sizes: Sizes, limits: Limits, layers: dict[str, list[Layer]], nbits: int, M: int, what: str
) -> Iterator[Row]:
    N, K = sizes.weight
    x = torch.randn(M, K, device=sizes.device, dtype=torch.bfloat16)
    grad = torch.randn(M, N, device=sizes.device, dtype=torch.bfloat16)
    calls: dict[str, Call] = {}
    for provider, provider_layers in layers.items():
        if _leaves_out(provider, what, M):
            continue
        call = _forward(provider_layers, x) if what == FORWARD else _both(provider_layers, x, grad)
        _, error = attempt(call)
        if error:
            yield _row(sizes, nbits, f"{what} M={M}", provider, note=error)
        else:
            calls[provider] = call
    milliseconds = medians(calls, sizes.device, sizes.rounds)
    least_ms = _least_ms(sizes, limits, nbits, M, what)
    for provider, ms in milliseconds.items():
        share = None if provider == BASELINE else least_ms / ms
        yield _row(sizes, nbits, f"{what} M={M}", provider, ms, ms / milliseconds[BASELINE], share)


def _leaves_out(provider: str, what: str, M: int) -> bool:
    if provider == "gemlite" and M > GEMLITE_MAX_ROWS:
        return True
    return what == BOTH and provider in INFERENCE_ONLY


def _forward(layers: list[Layer], x: Tensor) -> Call:
    rotation = itertools.cycle(layers)

    def call() -> None:
        with torch.no_grad():
            next(rotation)(x)

    return call


def _both(layers: list[Layer], x: Tensor, grad: Tensor) -> Call:
    rotation, x = itertools.cycle(layers), x.clone().requires_grad_()
    return lambda: torch.autograd.grad(next(rotation)(x), x, grad)


def _least_ms(sizes: Sizes, limits: Limits, nbits: int, M: int, what: str) -> float:
    """Return the least possible time in ms.

    The limit is set by moving packed weight, input and output once, or by the product's operations.
    """
    N, K = sizes.weight
    moved = N * K * nbits / 8 + 4 * N * K / GROUP_SIZE + 2 * M * (N + K)
    return (1 if what == FORWARD else 2) * limits.ms(moved, 2 * M * N * K)


def _row(
    sizes: Sizes, nbits: int, what: str, provider: str, ms: float | None = None,
    ratio: float | None = None, share: float | None = None, note: str = "",
) -> Row:  # fmt: skip
    baseline = "" if ratio is None else BASELINE
    return Row(
        "linear", what, sizes.shape, provider, nbits, GROUP_SIZE, 1, ms, baseline, ratio, share,
        note,
    )  # fmt: skip
