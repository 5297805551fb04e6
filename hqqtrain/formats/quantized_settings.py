"""The settings of quantized layers, as `config.json` of a quantized folder has them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.models.foreign.registry import open_foreign
from hqqtrain.models.fqn import base_model, strip_wrappers
from hqqtrain.models.source import ModelSource, read_config_json
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels.layout import LAYOUT_VERSION, Layout


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_META_DTYPES = {_dtype_name(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}
"""Dtypes of scale and zero by their names in config.json."""


@dataclass(frozen=True)
class ModuleSettings:
    """The settings of a quantized linear layer, in JSON types.

    Attributes:
        nbits: Bits of a code.
        group_size: Weights that share a scale; None: a whole row or column.
        axis: The axis along which groups run, as in hqq.
        solver: Name of the algorithm that found scale and zero.
        meta_dtype: Name of the dtype of scale and zero, which hqq calls metadata. It has nothing to
            do with PyTorch's meta device.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        zero: `float`, or `integer` if the zeros are codes.
    """

    nbits: int
    group_size: int | None
    axis: int
    solver: str
    meta_dtype: str
    out_features: int
    in_features: int
    zero: str = "float"

    @classmethod
    def from_module(cls, module: HQQLinear) -> "ModuleSettings":
        """Return the settings of a quantized layer."""
        return cls.from_spec(module.spec, module.layout)

    @classmethod
    def from_spec(cls, spec: QuantSpec, layout: Layout) -> "ModuleSettings":
        """Return the settings of a packed weight."""
        return cls(
            nbits=spec.nbits,
            group_size=spec.group_size,
            axis=spec.axis,
            solver=spec.solver,
            meta_dtype=_dtype_name(spec.meta_dtype),
            out_features=layout.out_features,
            in_features=layout.in_features,
            zero=spec.zero,
        )

    @property
    def spec(self) -> QuantSpec:
        """The settings as a `QuantSpec`.

        Raises:
            KeyError: `meta_dtype` is unknown.
        """
        meta_dtype = _META_DTYPES[self.meta_dtype]
        return QuantSpec(self.nbits, self.group_size, self.axis, self.solver, meta_dtype, self.zero)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, without those that the first release did not have.

        The fingerprint covers them, so a model of that release keeps its fingerprint.
        """
        return {k: v for k, v in asdict(self).items() if (k, v) != ("zero", "float")}

    @property
    def layout(self) -> Layout:
        """The layout of the packed weight."""
        return self.spec.layout(self.out_features, self.in_features)


@dataclass(frozen=True)
class QuantizedSettings:
    """The part of a quantized model's config.json that describes its quantization."""

    modules: dict[str, ModuleSettings]
    fingerprint: str

    @classmethod
    def from_model(cls, model: nn.Module, fingerprint: str = "") -> "QuantizedSettings":
        """Collect the settings of every HQQLinear in `model`, by its name in the checkpoint."""
        modules = {
            strip_wrappers(name): ModuleSettings.from_module(module)
            for name, module in base_model(model).named_modules()
            if isinstance(module, HQQLinear)
        }
        return cls(modules, fingerprint)

    def names_in(self, model: PreTrainedModel) -> dict[str, str]:
        """Return the names of the quantized layers in a dense model -> their names here.

        transformers loads a causal LM into its base model, too, whose names lack the prefix
        `model.`, and the other way round, and into models with other heads. A head that `model`
        lacks is left out.
        """
        prefix = f"{model.base_model_prefix}."
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        has_prefix = any(name.startswith(prefix) for name in self.modules)
        names = {}
        for name in self.modules:
            forms = (name, name.removeprefix(prefix), f"{prefix}{name}")
            found = next((form for form in forms if form in linears), None)
            if found or not has_prefix or name.startswith(prefix):
                names[found or name] = name
        return names

    def renamed(self, names: Mapping[str, str]) -> "QuantizedSettings":
        """Return the settings of the layers in `names`, new name -> name here."""
        return replace(self, modules={new: self.modules[old] for new, old in names.items()})

    def check_model(self, model: nn.Module, path: Path | str) -> None:
        """Check that all modules are linear layers of a dense `model`, in its shapes.

        Args:
            model: The model, on any device.
            path: The file that the settings are from, for messages.

        Raises:
            UserError: One is not, or has another shape.
        """
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        for name, settings in self.modules.items():
            shape = (settings.out_features, settings.in_features)
            if name not in linears or linears[name].weight.shape != shape:
                raise UserError(
                    f"{path}: quantization_config has {name} as a linear layer of shape "
                    f"{list(shape)}, which the model does not have. Use the config.json that "
                    "belongs to the weights, or quantize the dense model again."
                )

    def by_module(self) -> dict[str, dict[str, Any]]:
        """Return the settings as JSON values, as `Fingerprint.hexdigest` expects them."""
        return {name: settings.to_json() for name, settings in self.modules.items()}

    def quantization_config(self) -> dict[str, Any]:
        """Return the `quantization_config` entry of config.json."""
        return {
            "quant_method": "hqqtrain",
            "layout_version": LAYOUT_VERSION,
            "fingerprint": self.fingerprint,
            "modules": self.by_module(),
        }


def source_settings(source: ModelSource) -> QuantizedSettings:
    """Read the settings of the quantized weights of `source`.

    Those of another program's weights have an empty fingerprint. It is known once they are loaded.

    Raises:
        UserError: As in `read_quantized_settings`, or the weights cannot be taken over.
    """
    if not source.foreign:
        return read_quantized_settings(source.path)
    layers = open_foreign(source).layers
    modules = {
        name: ModuleSettings.from_spec(each.spec, each.layout) for name, each in layers.items()
    }
    return QuantizedSettings(modules, "")


def read_quantized_settings(folder: Path) -> QuantizedSettings:
    """Read the settings from config.json of a quantized folder.

    Raises:
        UserError: The folder is not quantized by hqqtrain, has another layout version, or is
            damaged.
    """
    config = read_config_json(folder).get("quantization_config") or {}
    return parse_quantized_settings(config, folder / "config.json")


def parse_quantized_settings(config: Mapping[str, Any], path: Path | str) -> QuantizedSettings:
    """Read the settings from a `quantization_config`.

    Args:
        config: The JSON values.
        path: The file that they are from, for messages.

    Raises:
        UserError: As in `read_quantized_settings`.
    """
    if config.get("quant_method") != "hqqtrain":
        raise UserError(f"{path}: not a model quantized by hqqtrain.")
    if config.get("layout_version") != LAYOUT_VERSION:
        raise UserError(
            f"{path}: layout_version={config.get('layout_version')}; this hqqtrain reads "
            f"{LAYOUT_VERSION}. Use the version that wrote it, or quantize again."
        )
    try:
        modules = {name: ModuleSettings(**values) for name, values in config["modules"].items()}
        for settings in modules.values():
            _ = settings.layout  # raises if the settings contradict each other
        return QuantizedSettings(modules, config["fingerprint"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: quantization_config is damaged ({error}).") from error
