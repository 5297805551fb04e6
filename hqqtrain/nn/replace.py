"""Replaces `nn.Linear` by `HQQLinear` where a configuration says so, and says what it did."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import QuantConfig
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.patterns import matches_pattern, matching_modules, settings_of
from hqqtrain.quant.spec import QuantSpec, spec_from_config

logger = logging.getLogger(__name__)

MUCH_LEFT_OUT = 0.7
"""Below this share of weights covered there is a warning; Qwen2-0.5B's embeddings leave 0.72."""


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_model` matched: names with their settings, and the share of weights.

    `covered` and `total` count weights; `total` is all parameters of the model, shared ones once.
    """

    matched: dict[str, QuantSpec]
    skipped: list[str]
    covered: int
    total: int

    @property
    def share(self) -> float:
        """Share of all weights that are quantized."""
        return self.covered / self.total


def quantize_model(model: nn.Module, config: QuantConfig, *,
                   compute_dtype: torch.dtype | None = None,
                   storage_dtype: torch.dtype = torch.uint8,
                   on_layer: Callable[[str], object] = lambda _: None) -> QuantizationReport:  # fmt: skip
    """Replaces, in place, the linears of `model` that `config` chooses.

    On the meta device the new layers are empty, to be filled later.

    Args:
        compute_dtype: dtype of dequantized weights; None: that of the linear's weight.

    Raises:
        UserError: no `nn.Linear`, fused experts, a pattern that matches nothing, a group_size
            that does not divide, or NaN or Inf in a weight.
    """
    specs, skipped = select_linears(model, config)
    total = sum(p.numel() for p in model.parameters())
    covered = replace_linears(
        model, specs, compute_dtype=compute_dtype, storage_dtype=storage_dtype, on_layer=on_layer
    )
    report = QuantizationReport(specs, skipped, covered, total)
    if report.share < MUCH_LEFT_OUT:
        logger.warning(
            "only %.0f %% of the weights are quantized: %d of %d; what stays out keeps its full "
            "size", 100 * report.share, covered, total,
        )  # fmt: skip
    return report


def select_linears(model: nn.Module, config: QuantConfig) -> tuple[dict[str, QuantSpec], list[str]]:
    """(name -> settings of every linear to quantize, names of those left out).

    Raises:
        UserError: as `quantize_model`, but for the weights.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not linears:
        raise UserError(f"{type(model).__name__}: has no nn.Linear, so nothing can be quantized.")
    _refuse_fused_experts(model, config)
    # The default skips an output head; a model without one is no mistake of the user's.
    wanted = [p for p in config.skip if p != "lm_head" or "lm_head" in linears]
    skipped = set(matching_modules("quant.skip", wanted, linears))
    matching_modules("quant.overrides", config.overrides, linears)
    _refuse_vain_overrides(config, [name for name in linears if name not in skipped])
    specs = {}
    for name, linear in linears.items():
        quantized, own = settings_of(name, config.overrides)
        if name in skipped or not quantized:
            continue
        specs[name] = spec_from_config(config, own)
        specs[name].layout(linear.out_features, linear.in_features, name)  # group_size divides
    if not specs:
        raise UserError(
            f"{type(model).__name__}: has no nn.Linear to quantize but {', '.join(linears)}, left "
            f"out by quant.skip={config.skip} and quant.overrides."
        )
    return specs, [name for name in linears if name not in specs]


def replace_linears(model: nn.Module, specs: Mapping[str, QuantSpec], *,
                    compute_dtype: torch.dtype | None = None,
                    storage_dtype: torch.dtype = torch.uint8,
                    on_layer: Callable[[str], object] = lambda _: None) -> int:  # fmt: skip
    """Replaces the linears named in `specs`, in place; returns how many weights they hold."""
    covered = 0
    for name, spec in specs.items():
        path, _, leaf = name.rpartition(".")
        parent = model.get_submodule(path)
        linear = getattr(parent, leaf)
        layer = HQQLinear.from_linear(
            linear, spec, compute_dtype=compute_dtype, storage_dtype=storage_dtype, name=name
        )
        setattr(parent, leaf, layer)
        covered += linear.out_features * linear.in_features
        on_layer(name)
    return covered


def _refuse_vain_overrides(config: QuantConfig, names: list[str]) -> None:
    """Settings of layers that quant.skip leaves out would be ignored in silence."""
    for pattern, settings in config.overrides.items():
        if settings is not None and not any(matches_pattern(pattern, name) for name in names):
            raise UserError(
                f"quant.overrides={pattern}: all it matches is left out by quant.skip="
                f"{config.skip}; take it out there, e.g. quant.skip=[]."
            )


def _refuse_fused_experts(model: nn.Module, config: QuantConfig) -> None:
    """transformers v5 fuses a layer's experts into 3-D parameters, which no linear holds."""
    for name, param in model.named_parameters():
        module = name.rpartition(".")[0]
        left_out = any(matches_pattern(pattern, module) for pattern in config.skip)
        if param.dim() == 3 and "expert" in name and not left_out:
            raise UserError(
                f"{name}: {list(param.shape)} holds fused mixture-of-experts weights, which "
                "cannot be quantized yet; leave them in full precision with "
                f"quant.skip='[lm_head,\"*.experts\"]'."
            )
