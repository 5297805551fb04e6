"""Let transformers load and save models that hqqtrain has quantized, and quantize others.

    import hqqtrain
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("runs/mine/quantized")

    from hqqtrain import HqqTrainConfig
    config = HqqTrainConfig(nbits=4, group_size=64)
    model = AutoModelForCausalLM.from_pretrained("model", quantization_config=config)

This module is imported while transformers is, so it imports the rest of hqqtrain only when a model
is loaded.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hqqtrain.compat import ignore_unexpected_tensors

METHOD = "hqqtrain"
"""The `quant_method` of our quantized folders."""

SETTINGS = ("nbits", "group_size", "axis", "solver", "zero", "meta_dtype", "skip", "overrides")
"""The keys of the group `quant` that `HqqTrainConfig` takes."""


@register_quantization_config(METHOD)
class HqqTrainConfig(QuantizationConfigMixin):
    """How to quantize a model, or the `quantization_config` of one that is quantized already.

    Args:
        description: The `quantization_config` of a quantized folder: `modules`, `layout_version`
            and `fingerprint`.
        settings: How to quantize a model: `nbits`, `group_size`, `axis`, `solver`, `zero`,
            `meta_dtype`, `skip` and `overrides`, as in the group `quant` of a run. The model is
            quantized without text. `dynamic_config` of transformers' `HqqConfig` may stand for
            `overrides`: tag of a layer -> `nbits`, `group_size` and `axis`; the other layers stay
            in full precision.
        offload_meta: Whether scale and zero stay in host memory, as `quant.offload_meta` of a run
            says. It is not saved.

    Raises:
        UserError: A setting does not exist, or its value is not allowed.
    """

    def __init__(
        self, *, quant_method: str = METHOD, offload_meta: bool = False, **values: Any
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers has an enum
        self.offload_meta = offload_meta
        names = ("modules", "layout_version", "fingerprint")
        self.description = {name: values.pop(name) for name in names if name in values}
        if (dynamic := values.pop("dynamic_config", None)) is not None:
            values["overrides"] = _overrides_of(dynamic, values.get("overrides"))
        # Only what config.json can hold: tuples become lists, and other objects their text.
        self.settings = json.loads(json.dumps(values, default=str))
        self.quant_config()

    def quant_config(self) -> Any:
        """Return the settings as a `QuantConfig`."""
        from hqqtrain.common.errors import UserError
        from hqqtrain.config.field import field_errors
        from hqqtrain.config.public_function import did_you_mean
        from hqqtrain.config.quant import QuantConfig
        from hqqtrain.config.typed_group import build_group

        if unknown := self.settings.keys() - SETTINGS:
            hint = did_you_mean(min(unknown), SETTINGS)
            raise UserError(
                f"HqqTrainConfig: {', '.join(sorted(unknown))} is no setting; allowed are "
                f"{', '.join(SETTINGS)} and offload_meta.{hint}"
            )
        settings = self.settings | {"offload_meta": self.offload_meta}
        config = build_group(QuantConfig, settings, "HqqTrainConfig")
        config.calibration = None
        if not config.quantizes:
            raise UserError(
                "HqqTrainConfig.nbits=None: nothing would be quantized; load the model without "
                "quantization_config."
            )
        with _named_as_here():
            advice = "use task=quantize, which has text"
            if errors := [*field_errors("quant", config), *config.errors(advice)]:
                raise UserError("\n".join(errors))
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON values for config.json."""
        return {"quant_method": METHOD, **self.description, **self.settings}


@register_quantizer(METHOD)
class HqqTrainQuantizer(HfQuantizer):
    """Replaces the linears of a model, before packed weights are loaded or after dense ones are."""

    quantization_config: HqqTrainConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the settings of the layers.

        Raises:
            UserError: They are damaged, or those of another layout version.
        """
        if self.pre_quantized:
            self._settings()

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` can save the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model."""
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """Return what `save_pretrained` writes, and no metadata for the file.

        It is called before config.json is written, which gets the settings of the layers that the
        model has now.
        """
        from hqqtrain.formats.packed import placeholders
        from hqqtrain.integrations.checkpoint_check import current_settings

        config: Any = model.config
        settings = current_settings(model, self._settings())
        self.quantization_config.description = settings.quantization_config()
        if settings.modules:
            config.quantization_config = self.quantization_config
        elif hasattr(config, "quantization_config"):  # all layers were replaced
            del config.quantization_config
        return {**model.state_dict(), **dict(placeholders(settings))}, {}

    def _settings(self) -> Any:
        """Return the `QuantizedSettings`."""
        from hqqtrain.formats.quantized_settings import parse_quantized_settings

        return parse_quantized_settings(self.quantization_config.to_dict(), "config.json")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Put empty `HQQLinear`s in the places of the quantized linears."""
        if not self.pre_quantized:
            return model
        from hqqtrain.formats.packed import placeholders
        from hqqtrain.integrations.checkpoint_check import check_files
        from hqqtrain.nn.replace import replace_linears

        stored = self._settings()
        self._is_checked = check_files(kwargs.get("checkpoint_files") or (), stored.modules)
        self._stored_names = stored.names_in(model)
        settings = stored.renamed(self._stored_names)
        settings.check_model(model, "config.json")
        replace_linears(model, {name: one.spec for name, one in settings.modules.items()})
        untie_quantized(model)
        expected = (*placeholders(stored), *placeholders(settings))
        ignore_unexpected_tensors(model, [name for name, _ in expected])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Quantize dense weights; freeze packed ones, which transformers loads as trainable."""
        from hqqtrain.common.errors import UserError
        from hqqtrain.integrations.checkpoint_check import check_fingerprint
        from hqqtrain.models.offload import offload_meta

        if model.tp_size:
            raise UserError(
                f"tp_plan: {model.tp_size} tensor-parallel parts: packed weights cannot be split "
                "by transformers; use device_map to place layers on several GPUs."
            )
        if not self.pre_quantized:
            self.report = self._quantize(model)
        elif not self._is_checked:
            check_fingerprint(model, self._settings(), self._stored_names)
        for module in _hqq_linears(model).values():
            module.requires_grad_(False)
        # PEFT's prepare_model_for_kbit_training would otherwise cast scale and zero to fp32.
        model.hqq_quantized = True
        if self.quantization_config.offload_meta:
            offload_meta(model)
        return model

    def _quantize(self, model: Any) -> Any:
        """Quantize a dense model in place, layer after layer; return a `QuantizationReport`."""
        from hqqtrain.common.errors import UserError
        from hqqtrain.formats.packed import fingerprinted
        from hqqtrain.nn.replace import quantize_model

        if any(param.is_meta for param in model.parameters()):
            raise UserError(
                "HqqTrainConfig: a model with layers on disk cannot be quantized; use a device_map "
                "without disk, or task=quantize, which needs one dense decoder layer at a time."
            )
        config = self.quantization_config
        with _named_as_here():
            report = quantize_model(model, config.quant_config())
        untie_quantized(model)
        config.description, config.settings = fingerprinted(model).quantization_config(), {}
        return report

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace every `HQQLinear` by a dense linear. Adapters of the base still fit."""
        from hqqtrain.formats.adapter_base import base_fingerprint
        from hqqtrain.formats.packed import BASE_FINGERPRINT
        from hqqtrain.nn.replace import dequantize_linears

        setattr(model.config, BASE_FINGERPRINT, base_fingerprint(model))
        dequantize_linears(model, dtype)
        model.hqq_quantized = False
        return model


def _overrides_of(dynamic_config: Any, overrides: Any) -> dict[str, Any]:
    """Return the `overrides` that `dynamic_config` of transformers' `HqqConfig` stands for.

    Raises:
        UserError: There are `overrides`, too, or it is no mapping of mappings.
    """
    from hqqtrain.common.errors import UserError

    is_nested = isinstance(dynamic_config, dict) and all(
        isinstance(settings, dict) for settings in dynamic_config.values()
    )
    if not is_nested or overrides:
        fault = "overrides is given, too" if is_nested else "must map tags to dicts of settings"
        raise UserError(f"HqqTrainConfig.dynamic_config: {fault}; use one of the two.")
    default = {"nbits": 4, "group_size": 64, "axis": 1}  # those of hqq's BaseQuantizeConfig
    settings = {tag: default | given for tag, given in dynamic_config.items()}
    return {"*": None, **settings}


def quantize_in_memory(model: Any, config: HqqTrainConfig) -> Any:
    """Quantize a dense model of transformers, as if it had been loaded with `config`.

    Returns:
        The `QuantizationReport`.

    Raises:
        UserError: As in `quantize_model` of `hqqtrain.nn.replace`.
    """
    quantizer = HqqTrainQuantizer(config, pre_quantized=False)
    try:
        quantizer.preprocess_model(model)
        quantizer.postprocess_model(model)
    except BaseException:
        quantizer.remove_quantization_config(model)
        raise
    model.hf_quantizer = quantizer
    return quantizer.report


@contextmanager
def _named_as_here() -> Iterator[None]:
    """Let an error of the group `quant` name the settings of `HqqTrainConfig`."""
    from hqqtrain.common.errors import UserError

    try:
        yield
    except UserError as error:
        text = re.sub(r"\bquant\.(?=\w)", "HqqTrainConfig.", str(error))
        text = re.sub(r"(?<=[= ])null\b", "None", text)
        raise UserError(text) from error


def untie_quantized(model: Any) -> None:
    """Let transformers tie no weight of a quantized linear, which has no `weight`."""
    quantized = {f"{name}.weight" for name in _hqq_linears(model)}
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {
        target: source for target, source in tied.items() if not {target, source} & quantized
    }


def _hqq_linears(model: nn.Module) -> dict[str, Any]:
    """Return the `HQQLinear`s of a model, by name."""
    from hqqtrain.nn.hqq_linear import HQQLinear

    return {name: m for name, m in model.named_modules() if isinstance(m, HQQLinear)}
