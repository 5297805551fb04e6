"""Replace the `nn.Linear` modules that a configuration selects by `HQQLinear`.

With `quant.nbits=null` they become `DenseLinear` and keep their weights.

A report says what was quantized, because a pattern that selects too little would otherwise go
unnoticed.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hqqtrain.common.errors import ErrorCollector, UserError
from hqqtrain.config.quant import QuantConfig
from hqqtrain.nn.base_linears import DenseLinear
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.patterns import matches_pattern, matching_modules, resolve_overrides
from hqqtrain.quant.spec import QuantSpec, spec_from_config

logger = logging.getLogger(__name__)

MIN_QUANTIZED_SHARE = 0.7
"""If less than this share of the parameters is quantized, a warning is logged.

Qwen2-0.5B, which has large embeddings, has a share of 0.72.
"""


@dataclass(frozen=True)
class QuantizationReport:
    """Result of `quantize_model`.

    Attributes:
        quantized: The settings of every quantized linear, by its name.
        dense: Names of the linears that would be quantized without `quant.nbits=null`.
        skipped: Names of the other linears.
        num_quantized_weights: Number of weights that were quantized.
        num_parameters: Number of parameters of the model before; tied ones count once.
    """

    quantized: dict[str, QuantSpec]
    dense: list[str]
    skipped: list[str]
    num_quantized_weights: int
    num_parameters: int

    @property
    def share(self) -> float:
        """Share of the model's parameters that were quantized."""
        return self.num_quantized_weights / self.num_parameters

    def __repr__(self) -> str:
        """Return one line; all layers of a model would fill several pages."""
        bits = Counter(spec.nbits for spec in self.quantized.values())
        layers = ", ".join(f"{bits[n]} of {n} bits" for n in sorted(bits)) or "none"
        return (
            f"{type(self).__name__}(quantized={len(self.quantized)} layers ({layers}), "
            f"dense={len(self.dense)}, skipped={len(self.skipped)}, share={self.share:.1%})"
        )


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
        UserError: The model has no `nn.Linear`, or it has fused experts that are not skipped. Or a
            pattern matches nothing, a group_size does not divide, or a weight contains NaN or
            infinity.
    """
    specs, skipped = select_linears(model, config)
    # Count before replacing: a packed parameter has fewer elements than its weight.
    num_parameters = sum(p.numel() for p in model.parameters())
    num_quantized_weights = replace_linears(
        model, specs, compute_dtype=compute_dtype, storage_dtype=storage_dtype, on_layer=on_layer
    )
    quantized = {name: spec for name, spec in specs.items() if spec}
    dense = [name for name in specs if name not in quantized]
    report = QuantizationReport(quantized, dense, skipped, num_quantized_weights, num_parameters)
    if config.quantizes and report.share < MIN_QUANTIZED_SHARE:
        logger.warning(
            "only %.0f %% of the weights are quantized: %d of %d; the others keep their full size",
            100 * report.share, num_quantized_weights, num_parameters,
        )  # fmt: skip
    return report


def select_linears(
    model: nn.Module, config: QuantConfig
) -> tuple[dict[str, QuantSpec | None], list[str]]:
    """Select the linears to quantize.

    Returns:
        The settings of every linear to quantize, by its name, and the names of the other linears.
        With `quant.nbits=null` there are no settings, but None for each of the same linears.

    Raises:
        UserError: As in `quantize_model`, except for weights with NaN or infinity.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not linears.keys() - {output_head_name(model)}:
        _refuse_conv1d(model)
    if not linears:
        raise UserError(f"{type(model).__name__}: has no nn.Linear, so nothing can be quantized.")
    if config.quantizes:
        _refuse_fused_experts(model, config)
    # "lm_head" in quant.skip, which is there by default, is the output head under any name. A model
    # without one is no error.
    head = output_head_name(model)
    skip_patterns = [p for p in config.skip if p != "lm_head" or "lm_head" in linears]
    # Every other pattern must match something: a linear, or a module with fused experts.
    experts = [name.rpartition(".")[0] for name in fused_experts(model)]
    errors, skipped = ErrorCollector(), set()
    with errors.collect():
        skipped |= set(matching_modules("quant.skip", skip_patterns, [*linears, *experts]))
    if head is not None and head in linears and "lm_head" in config.skip:
        skipped.add(head)
    with errors.collect():
        # Called for its check only: every override must match a linear.
        matching_modules("quant.overrides", config.overrides, linears)
        _refuse_unused_overrides(config, linears, skipped)
    # Settings of each linear: those of `config`, with the overrides that match its name.
    specs: dict[str, QuantSpec | None] = {}
    for name in linears:
        is_quantized, override = resolve_overrides(name, config.overrides)
        if name not in skipped and is_quantized:
            specs[name] = spec_from_config(config, override) if config.quantizes else None
    with errors.collect():
        _check_group_sizes(specs, linears)
    errors.raise_if_any()
    if not specs:
        raise UserError(
            f"{type(model).__name__}: has no nn.Linear to quantize: quant.skip={config.skip} and "
            f"quant.overrides exclude all of {', '.join(linears)}."
        )
    return specs, [name for name in linears if name not in specs]


def replace_linears(model: nn.Module, specs: Mapping[str, QuantSpec | None], *,
                    compute_dtype: torch.dtype | None = None,
                    storage_dtype: torch.dtype = torch.uint8,
                    on_layer: Callable[[str], object] = lambda _: None) -> int:  # fmt: skip
    """Quantize the linears named in `specs`, and replace them in place.

    Args:
        model: The model.
        specs: The settings of the linears, by name; None: the linear stays dense.
        compute_dtype: Dtype of dequantized weights; None: that of each linear's weight.
        storage_dtype: Dtype of W_q.
        on_layer: Called with the name of every replaced linear.

    Returns:
        The number of weights that are quantized.

    Raises:
        UserError: A weight contains NaN or infinity.
    """
    num_quantized_weights = 0
    for name, spec in specs.items():
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, attribute)
        if spec is None:
            setattr(parent, attribute, DenseLinear.from_linear(linear))
            continue
        layer = HQQLinear.from_linear(
            linear, spec, compute_dtype=compute_dtype, storage_dtype=storage_dtype, name=name
        )
        setattr(parent, attribute, layer)
        num_quantized_weights += linear.out_features * linear.in_features
        on_layer(name)
    return num_quantized_weights


def output_head_name(model: nn.Module) -> str | None:
    """Return the name of the module that computes the logits; None if `model` has none."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return next((name for name, module in model.named_modules() if module is head), None)


def _refuse_conv1d(model: nn.Module) -> None:
    """Raise UserError for a model whose linear layers are all transformers' `Conv1D`."""
    name = next((n for n, m in model.named_modules() if isinstance(m, Conv1D)), None)
    if name is not None:
        raise UserError(
            f"{type(model).__name__}: its linear layers, such as {name}, are transformers' Conv1D, "
            "as in GPT-2, which stores a weight transposed and cannot be quantized yet; use a "
            "model whose layers are nn.Linear."
        )


def _check_group_sizes(
    specs: Mapping[str, QuantSpec | None], linears: Mapping[str, nn.Linear]
) -> None:
    """Raise UserError if group sizes do not divide; one line for each, about the first layer."""
    errors, refused = ErrorCollector(), set()
    for name, spec in specs.items():
        if spec is not None and spec not in refused:
            with errors.collect():
                refused.add(spec)
                spec.layout(linears[name].out_features, linears[name].in_features, name)
                refused.remove(spec)
    errors.raise_if_any()


def _refuse_unused_overrides(
    config: QuantConfig, linears: Iterable[str], skipped: Set[str]
) -> None:
    """Raise UserError for an override without effect: quant.skip excludes all that it matches."""
    for pattern, settings in config.overrides.items():
        matched = [name for name in linears if matches_pattern(pattern, name)]
        if settings is None or not skipped >= set(matched):
            continue
        other_skips = [p for p in config.skip if not any(matches_pattern(p, n) for n in matched)]
        raise UserError(
            f"quant.overrides={pattern}: has no effect, because quant.skip={config.skip} excludes "
            "every linear layer that it matches. Remove the override, or quantize these layers "
            f"with {skip_argument(other_skips)}."
        )


def dequantize_linears(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every `HQQLinear` of `model` by a dense linear, below an adapter, too.

    Args:
        model: The model, changed in place.
        dtype: Dtype of the weights; None: the `compute_dtype` of each layer.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, HQQLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
            linear.register_parameter("bias", module.bias)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear)


def skip_argument(patterns: Sequence[str]) -> str:
    """Return the command-line argument that sets quant.skip to `patterns`."""
    quoted = [p if p.isidentifier() else f'"{p}"' for p in patterns]  # Hydra needs quotes for globs
    return f"quant.skip='[{','.join(quoted)}]'"


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the fused mixture-of-experts weights [experts, ...] of `model`, by their full name.

    transformers v5 fuses the experts of a layer into 3-D parameters, which no `nn.Linear` contains.
    They are recognized by the word "expert" in their full name, which includes the names of all
    modules around them, or in the class of their module.
    """
    experts = {}
    for module_name, module in model.named_modules():
        class_name = type(module).__name__
        for name, param in module.named_parameters(prefix=module_name, recurse=False):
            if param.dim() == 3 and "expert" in f"{name} {class_name}".lower():
                experts[name] = param
    return experts


def _refuse_fused_experts(model: nn.Module, config: QuantConfig) -> None:
    """Raise UserError for mixture-of-experts weights that are not excluded by quant.skip."""
    refused = {
        name: param
        for name, param in fused_experts(model).items()
        if not any(matches_pattern(p, name.rpartition(".")[0]) for p in config.skip)
    }
    if refused:
        name, param = next(iter(refused.items()))
        # One glob for each kind of module; `select_linears` accepts a module with such weights.
        patterns = dict.fromkeys(f"*.{name.split('.')[-2]}" for name in refused)
        raise UserError(
            f"{name}: {list(param.shape)} are fused mixture-of-experts weights, which cannot be "
            "quantized yet; keep them in full precision with "
            f"{skip_argument([*config.skip, *patterns])}."
        )
