"""Let RMSNorm and rotary position embeddings of a model run as one kernel each, on a GPU.

In PyTorch each is five to ten operations that read and write all hidden states, partly in fp32.
Modules, parameters and their names stay as they are.

The kernels run in passes with gradients. Evaluation and generation use the code of the model, so
that a run measures what `task=eval` and other programs measure.

Models differ in details: Gemma adds 1 to the weight, others round elsewhere. So every kind of
module is called with random input next to its kernel, and keeps its own code unless both agree.

The kernels are our own. The backward kernel of liger-kernel 0.8.5 also fills its output with zeros
and computes a gradient of the weight, and its rotation writes into its input, which has to be
copied first.
"""

import copy
import inspect
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.models.fqn import base_model
from hqqtrain.nn import liger, rms_norm, rotary
from hqqtrain.nn.replacement import replace_attribute
from hqqtrain.training.fused_layers import fuse_layers
from hqqtrain_kernels import backend
from hqqtrain_kernels.norm_params import NormParams

logger = logging.getLogger(__name__)

VARIANTS = (
    NormParams(0.0, 0.0, "llama"),
    NormParams(0.0, 0.0, "gemma"),
    NormParams(0.0, 1.0, "gemma"),
)
"""The variants of RMSNorm: the offset of the weight, and where the result is rounded."""

PROBE_SIZE = 128
"""Size of the hidden states in the probe, because the weight of the module may be sharded."""

TOLERANCE = 2.0**-7
"""Largest error of a kernel in the probe, relative to the largest value; bf16 rounds by 2^-8."""

Rotate = Callable[..., tuple[Tensor, Tensor]]
"""transformers' `apply_rotary_pos_emb`: (query, key, cos, sin) -> (query, key)."""


def fuse_modules(
    model: nn.Module, device: torch.device, undo: ExitStack | None = None, *, logs: bool = True
) -> None:
    """Replace RMSNorms and rotary embeddings of `model` by kernels, in place, if there is a GPU.

    Args:
        model: A causal language model, as the strategy has wrapped it.
        device: Device of this rank.
        undo: Takes the changes back when it is closed; None: they stay.
        logs: Whether to log what was replaced.
    """
    if device.type != "cuda" or not backend.use_triton(device):
        return
    base = base_model(model)
    norms = fuse_norms(base, device, undo)
    layers, rotations = fuse_layers(base, norms, undo), fuse_rotations(base, device, undo)
    if not logs:
        return
    logger.info(
        "train.fused=auto: kernels for %d norms, %d of them with residual connections, and for %d "
        "rotary embeddings", len(norms), 2 * layers, rotations,
    )  # fmt: skip
    if not liger.has_liger():
        logger.info("train.fused=auto: `pip install 'hqqtrain[liger]'` makes the loss faster")


def fuse_norms(
    model: nn.Module, device: torch.device, undo: ExitStack | None = None
) -> dict[nn.Module, NormParams]:
    """Let the frozen RMSNorms of `model` call a kernel; return those that do."""
    variants: dict[tuple, NormParams | None] = {}
    fused = {}
    for module in model.modules():
        if not _is_frozen_rms_norm(module):
            continue
        eps = _eps(module)
        kind = (type(module), module.weight.dtype, eps)
        if kind not in variants:
            variants[kind] = _matching_variant(module, eps, device)
        if params := variants[kind]:
            forward = partial(_norm_forward, module, module.forward, params)
            replace_attribute(module, "forward", forward, undo)
            fused[module] = params
    return fused


def _norm_forward(module: Any, plain: Any, params: NormParams, hidden_states: Tensor) -> Tensor:
    if rms_norm.is_computable(hidden_states, module.weight):
        return rms_norm.rms_norm(hidden_states, module.weight, params)
    return plain(hidden_states)


def _is_frozen_rms_norm(module: Any) -> bool:
    """Whether `module` is an RMSNorm of one argument, with a frozen weight and nothing else."""
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(_eps(module), float):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.requires_grad or weight.dim() != 1:
        return False
    has_more = any(True for _ in (*module.children(), *module.buffers()))
    has_groups = any("group" in name for name in vars(module))
    is_unary = len(inspect.signature(module.forward).parameters) == 1
    return is_unary and not (has_more or has_groups)


def _eps(module: Any) -> Any:
    """Return the number that an RMSNorm adds to the mean square; None if it has no known name."""
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


@torch.no_grad()
def _matching_variant(module: nn.Module, eps: float, device: torch.device) -> NormParams | None:
    """Return the variant of the kernel that computes what `module` computes; None if none does."""
    dtype: Any = module.weight.dtype
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    twin = copy.copy(module)  # with a whole weight, because that of `module` may be sharded
    twin.__dict__.pop("weight", None)
    values = torch.rand(PROBE_SIZE, **options).add_(0.5).to(dtype)
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(values, requires_grad=False)}
    hidden = torch.randn(8, PROBE_SIZE, **options).to(dtype)
    try:
        expected = twin.forward(hidden)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it needs more than a weight
        return None
    variants = [variant._replace(eps=eps) for variant in VARIANTS]
    errors = {
        params: _error(rms_norm.rms_norm(hidden, values, params), expected) for params in variants
    }
    best = min(variants, key=lambda params: errors[params])
    return best if errors[best] <= TOLERANCE else None


def fuse_rotations(model: nn.Module, device: torch.device, undo: ExitStack | None = None) -> int:
    """Let the modeling code of `model` rotate query and key by a kernel; return how many do.

    The function is an attribute of the Python module of a model family, so other models of this
    process use the kernel on a GPU, too.
    """
    fused = 0
    for name in sorted({type(module).__module__ for module in model.modules()}):
        code: Any = sys.modules.get(name)
        rotate = getattr(code, "apply_rotary_pos_emb", None)
        if isinstance(rotate, FusedRotation):
            fused += 1
        elif inspect.isfunction(rotate) and _rotates_like_llama(rotate, device):
            replace_attribute(code, "apply_rotary_pos_emb", FusedRotation(rotate), undo)
            fused += 1
    return fused


class FusedRotation:
    """transformers' `apply_rotary_pos_emb` that uses a kernel for what the kernel supports.

    Args:
        plain: The function that it replaces, for everything else.
    """

    def __init__(self, plain: Rotate) -> None:
        self.plain = plain

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        is_plain_call = q.is_cuda and not args and not kwargs
        if is_plain_call and rotary.is_computable(q, k, cos, sin):
            return rotary.rotate(q, k, cos, sin)
        return self.plain(q, k, cos, sin, *args, **kwargs)


@torch.no_grad()
def _rotates_like_llama(rotate: Rotate, device: torch.device) -> bool:
    """Whether `rotate` gives what the kernel gives, for random input."""
    if list(inspect.signature(rotate).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    query, key = torch.randn(2, 4, 6, 16, **options), torch.randn(2, 2, 6, 16, **options)
    cos, sin = torch.randn(2, 2, 6, 8, **options).repeat(1, 1, 1, 2)
    try:
        expected = rotate(query, key, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):  # a function of another shape
        return False
    found = rotary.rotate(query, key, cos, sin)
    pairs = zip(found, expected, strict=True)
    return all(_error(ours, theirs) <= TOLERANCE for ours, theirs in pairs)


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest value; infinity if the shapes differ."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    difference = (found.float() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max())
