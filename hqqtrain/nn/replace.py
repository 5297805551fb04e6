"""Replace the `nn.Linear` modules that a configuration selects by `HQQLinear`.

The result is reported, because a pattern that selects too little would otherwise go unnoticed.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import QuantConfig
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.patterns import matches_pattern, matching_modules, resolve_overrides
from hqqtrain.quant.spec import QuantSpec, spec_from_config

logger = logging.getLogger(__name__)

MIN_QUANTIZED_SHARE = 0.7
"""Smallest quantized share of the weights without a warning.

Qwen2-0.5B with its large embeddings has a share of 0.72.
"""


@dataclass(frozen=True)
class QuantizationReport:
    """Result of `quantize_model`.

    Attributes:
        quantized: Name -> settings of every linear that was quantized.
        skipped: Names of the other linears.
        quantized_weights: Weights that were quantized.
        parameters: Parameters of the model; tied ones count once.
    """

    quantized: dict[str, QuantSpec]
    skipped: list[str]
    quantized_weights: int
    parameters: int

    @property
    def share(self) -> float:
        """Share of the model's parameters that were quantized."""
        return self.quantized_weights / self.parameters


def quantize_model(model: nn.Module, config: QuantConfig, *,
                   compute_dtype: torch.dtype | None = None,
                   storage_dtype: torch.dtype = torch.uint8,
                   on_layer: Callable[[str], object] = lambda _: None,
                   ) -> QuantizationReport:  # fmt: skip
    """Quantize the linears of `model` that `config` selects, and replace them in place.

    On the meta device the new layers are empty; the caller loads their weights later.

    Args:
        model: The model.
        config: The group `quant` of the configuration.
        compute_dtype: Dtype of dequantized weights; None: that of each linear's weight.
        storage_dtype: Dtype of W_q.
        on_layer: Called with the name of every replaced linear.

    Raises:
        UserError: The model has no `nn.Linear` or has fused experts, a pattern matches nothing, a
            group_size does not divide, or a weight contains NaN or infinity.
    """
    specs, skipped = select_linears(model, config)
    total = sum(p.numel() for p in model.parameters())
    covered = replace_linears(
        model, specs, compute_dtype=compute_dtype, storage_dtype=storage_dtype, on_layer=on_layer
    )
    report = QuantizationReport(specs, skipped, covered, total)
    if report.share < MIN_QUANTIZED_SHARE:
        logger.warning(
            "only %.0f %% of the weights are quantized: %d of %d; the others keep their full size",
            100 * report.share, covered, total,
        )  # fmt: skip
    return report


def select_linears(model: nn.Module, config: QuantConfig) -> tuple[dict[str, QuantSpec], list[str]]:
    """Select the linears to quantize.

    Returns:
        Name -> settings of every linear to quantize, and the names of the other linears.

    Raises:
        UserError: As in `quantize_model`, except for weights with NaN or infinity.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not linears:
        raise UserError(f"{type(model).__name__}: has no nn.Linear, so nothing can be quantized.")
    _refuse_fused_experts(model, config)
    # quant.skip contains "lm_head" by default, so a model without an output head is no error.
    skip = [p for p in config.skip if p != "lm_head" or "lm_head" in linears]
    experts = [name.rpartition(".")[0] for name in fused_experts(model)]
    skipped = set(matching_modules("quant.skip", skip, [*linears, *experts]))
    # Called for its check only: every override must match a linear.
    matching_modules("quant.overrides", config.overrides, linears)
    _refuse_unused_overrides(config, [name for name in linears if name not in skipped])
    # Settings of each linear: those of `config`, with the overrides that match its name.
    specs = {}
    for name, linear in linears.items():
        quantized, own = resolve_overrides(name, config.overrides)
        if name in skipped or not quantized:
            continue
        specs[name] = spec_from_config(config, own)
        specs[name].layout(linear.out_features, linear.in_features, name)  # checks group_size
    if not specs:
        raise UserError(
            f"{type(model).__name__}: has no nn.Linear to quantize: quant.skip={config.skip} and "
            f"quant.overrides exclude all of {', '.join(linears)}."
        )
    return specs, [name for name in linears if name not in specs]


def replace_linears(model: nn.Module, specs: Mapping[str, QuantSpec], *,
                    compute_dtype: torch.dtype | None = None,
                    storage_dtype: torch.dtype = torch.uint8,
                    on_layer: Callable[[str], object] = lambda _: None) -> int:  # fmt: skip
    """Quantize the linears named in `specs`, and replace them in place.

    Args:
        model: The model.
        specs: Name -> settings of the linears.
        compute_dtype: Dtype of dequantized weights; None: that of each linear's weight.
        storage_dtype: Dtype of W_q.
        on_layer: Called with the name of every replaced linear.

    Returns:
        The number of weights in these linears.

    Raises:
        UserError: A weight contains NaN or infinity.
    """
    covered = 0
    for name, spec in specs.items():
        path, _, leaf = name.rpartition(".")
        parent = model.get_submodule(path)  # the module whose attribute is replaced
        linear = getattr(parent, leaf)
        layer = HQQLinear.from_linear(
            linear, spec, compute_dtype=compute_dtype, storage_dtype=storage_dtype, name=name
        )
        setattr(parent, leaf, layer)
        covered += linear.out_features * linear.in_features
        on_layer(name)
    return covered


def _refuse_unused_overrides(config: QuantConfig, names: list[str]) -> None:
    """Raise UserError for overrides of layers that quant.skip excludes: they have no effect."""
    for pattern, settings in config.overrides.items():
        if settings is not None and not any(matches_pattern(pattern, name) for name in names):
            raise UserError(
                f"quant.overrides={pattern}: quant.skip={config.skip} excludes everything "
                "that it matches; remove it from quant.skip, e.g. quant.skip=[]."
            )


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter [experts, ...] of fused mixture-of-experts weights.

    transformers v5 fuses the experts of a layer into 3-D parameters, which no `nn.Linear` contains.
    Either their name or the class of their module says what they are.
    """
    found = {}
    for path, module in model.named_modules():
        for leaf, param in module.named_parameters(prefix=path, recurse=False):
            if param.dim() == 3 and "expert" in f"{leaf} {type(module).__name__}".lower():
                found[leaf] = param
    return found


def _refuse_fused_experts(model: nn.Module, config: QuantConfig) -> None:
    """Raise UserError for mixture-of-experts weights that are not excluded by quant.skip."""
    for name, param in fused_experts(model).items():
        module = name.rpartition(".")[0]
        if not any(matches_pattern(pattern, module) for pattern in config.skip):
            raise UserError(
                f"{name}: {list(param.shape)} are fused mixture-of-experts weights, which "
                "cannot be quantized yet; keep them in full precision with "
                f"quant.skip='[lm_head,\"*.{module.rpartition('.')[2]}\"]'."
            )
