"""The backends for inference by name, and the replacement of layers by theirs.

To add a backend, write its file here, register it, and add its name to
`hqqtrain.config.quant.INFERENCE_BACKENDS`, which the command line reads without torch.
"""

import logging
from collections import Counter

import torch
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.inference.backends.base import ADVICE, InferenceBackend, RepackedLinear
from hqqtrain.inference.backends.gemlite import GemliteBackend
from hqqtrain.inference.backends.humming import HummingBackend
from hqqtrain.inference.backends.torchao import TorchaoBackend
from hqqtrain.nn.hqq_linear import HQQLinear

logger = logging.getLogger(__name__)

BACKENDS: dict[str, InferenceBackend] = {
    backend.name: backend for backend in (GemliteBackend(), HummingBackend(), TorchaoBackend())
}
"""The backends, by the values of `quant.backend`."""

HQQ_NAMES = {"torchao_int4": "torchao", "default": "auto"}
"""Names in hqq's `prepare_for_inference` -> ours."""

REPLACED = {
    "marlin": "hqq 0.2.8 has no code for it; humming computes the same bits, and more",
    "bitblas": "it has had no release since February 2025; humming computes the same bits",
    "torch": "hqqtrain_kernels.backend.set_backend('torch') chooses it, for the whole process",
    "triton": "hqqtrain_kernels.backend.set_backend('triton') chooses it, for the whole process",
}
"""Names that are no backend of this kind, and what to do instead."""

MAX_ERROR = 0.05
"""Largest relative error of one product that is taken for rounding; humming has 4e-3."""


def find_backend(name: str) -> InferenceBackend | None:
    """Return the backend with this name, ours or hqq's; None for `auto`: hqqtrain's own kernels.

    Raises:
        UserError: There is none.
    """
    name = HQQ_NAMES.get(name, name)
    if name == "auto":
        return None
    if name not in BACKENDS:
        reason = f"{REPLACED[name]}. " if name in REPLACED else ""
        raise UserError(f"backend={name}: {reason}Allowed are auto, {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def repack_linears(model: nn.Module, backend: InferenceBackend) -> None:
    """Let a backend compute every quantized layer of `model` that it can, in place.

    The other layers keep hqqtrain's kernels. Adapters around the layers stay.

    Raises:
        UserError: The backend cannot be used here, can compute none of the layers, or computes
            something else.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, HQQLinear)}
    if not layers:
        raise UserError(f"backend={backend.name}: the model has no quantized layers. Use auto.")
    first = next(iter(layers.values()))
    backend.check_usable(first.W_q.device, first.compute_dtype)
    del first
    refusals = {name: backend.refusal(layer) for name, layer in layers.items()}
    reasons = Counter(reason for reason in refusals.values() if reason)
    described = ", ".join(f"{count} with {reason}" for reason, count in reasons.items())
    total, usable = len(layers), len(layers) - reasons.total()
    if not usable:
        raise UserError(
            f"backend={backend.name}: can compute none of the {total} quantized layers: "
            f"{described}. {ADVICE}"
        )
    tried: set[object] = set()
    for name in list(layers):
        layer = layers.pop(name)  # its memory is free once it is replaced
        if refusals[name]:
            continue
        repacked = _repack(layer, backend, name, is_tried=layer.spec in tried)
        tried.add(layer.spec)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, repacked)
    rest = f"; hqqtrain's own kernels compute the others: {described}" if reasons else ""
    logger.info(
        "backend=%s: computes %d of %d quantized layers%s", backend.name, usable, total, rest
    )


@torch.no_grad()
def _repack(
    layer: HQQLinear, backend: InferenceBackend, name: str, *, is_tried: bool
) -> RepackedLinear:
    """Repack a layer, and compare a product with our own, unless one like it was compared.

    Raises:
        UserError: The package fails, or computes something else.
    """
    try:
        repacked = backend.repack(layer)
        if is_tried:
            return repacked
        x = torch.linspace(-1, 1, layer.in_features, device=layer.W_q.device)[None]
        x = x.to(layer.compute_dtype)
        expected, found = layer(x).float(), repacked(x).float()
    except Exception as error:  # of another package, of which any may come
        raise UserError(
            f"backend={backend.name}: failed at {name} with {type(error).__name__}: {error}. "
            f"{ADVICE}"
        ) from error
    difference = ((found - expected).norm() / expected.norm().clamp_min(1e-20)).item()
    if not difference < MAX_ERROR:
        raise UserError(
            f"backend={backend.name}: computes {name} with an error of {difference:.2g}, so its "
            f"version does not fit. {ADVICE}"
        )
    return repacked
