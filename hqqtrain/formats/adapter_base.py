"""The base of an adapter: how its file records it, and the check that a model is that base.

An adapter corrects the errors of the base that it was trained on; on any other base it adds noise.
PEFT warns about unknown keys in adapter_config.json. The fingerprint of the base is therefore
stored in the metadata of adapter_model.safetensors, which stock tools ignore.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.formats.adapter_config import WEIGHTS
from hqqtrain.formats.packed import BASE_FINGERPRINT, fingerprinted
from hqqtrain.formats.quantized_settings import read_quantized_settings
from hqqtrain.formats.writer import save_tensors
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.rundir.layout import RunLayout

logger = logging.getLogger(__name__)

_FINGERPRINT, _QUANTIZED = "hqqtrain_base_fingerprint", "hqqtrain_base_quantized"
"""Keys of the metadata."""


@dataclass(frozen=True)
class BaseModelRef:
    """The base of an adapter.

    Attributes:
        name: The name or path under which other tools load it.
        revision: Its revision on the hub.
        fingerprint: Its fingerprint.
        is_quantized: Whether hqqtrain has quantized it.
    """

    name: str
    revision: str | None
    fingerprint: str
    is_quantized: bool = True

    def metadata(self) -> dict[str, str]:
        """Return the metadata by which the file of an adapter records its base."""
        return {_FINGERPRINT: self.fingerprint, _QUANTIZED: str(self.is_quantized).lower()}


def recorded_fingerprint(metadata: dict[str, str]) -> str | None:
    """Return the fingerprint in the metadata of an adapter; None if it is of another tool."""
    return metadata.get(_FINGERPRINT)


def is_quantized_base(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of an adapter say that hqqtrain has quantized its base."""
    return metadata.get(_QUANTIZED) == "true"


def check_fingerprint(trained_on: str | None, base: str, origin: str, advice: str) -> None:
    """Check that an adapter was trained on the base with the fingerprint `base`.

    Args:
        trained_on: The fingerprint that the adapter records; None is accepted.
        base: The fingerprint of the base to use.
        origin: Where the adapter comes from, with which a message begins.
        advice: The end of a message.

    Raises:
        UserError: The adapter was trained on another base.
    """
    if trained_on not in (None, base):
        raise UserError(
            f"{origin}: trained on the base {trained_on}, but this base is {base}. {advice}"
        )


def check_base_of(model: nn.Module, file: Path, origin: str) -> dict[str, str]:
    """Check that a model of transformers is the base of an adapter, if the adapter records one.

    The dequantized weights of a base count as that base. An adapter that was trained on a dense
    model is accepted for any dense one, which records no fingerprint.

    Args:
        model: The model, perhaps with adapters.
        file: The adapter_model.safetensors of the adapter.
        origin: Where the adapter comes from, with which a message begins.

    Returns:
        The metadata by which the file records the base; empty if it does not.

    Raises:
        UserError: The model is another base, or has other weights than the quantized ones.
    """
    found = read_metadata(file)
    metadata = {key: found[key] for key in (_FINGERPRINT, _QUANTIZED) if key in found}
    trained_on = recorded_fingerprint(metadata)
    root = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if trained_on is None or root is None:
        return metadata
    fix = "Load the quantized/ that was saved with the adapter, or train a new adapter."
    if base := base_fingerprint(root):
        check_fingerprint(trained_on, base, origin, fix)
    elif _QUANTIZED not in metadata:  # of a version that did not record it
        logger.warning(
            "%s: trained on the base %s; on any other model it adds noise", origin, trained_on
        )
    elif is_quantized_base(metadata):
        raise UserError(
            f"{origin}: trained on the quantized base {trained_on}, but hqqtrain has not quantized "
            f"this model. {fix} If this model has the dequantized weights of that base, set "
            f'model.config.{BASE_FINGERPRINT} = "{trained_on}" first.'
        )
    return metadata


def base_metadata(model: nn.Module) -> dict[str, str]:
    """Return the metadata that records a model as the base; empty if it is not quantized."""
    root = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    fingerprint = base_fingerprint(root) if root is not None else None
    return BaseModelRef("", None, fingerprint).metadata() if fingerprint else {}


def record_base(folder: Path, metadata: Mapping[str, str]) -> None:
    """Write the metadata that records a base into the adapter in `folder`, if it has a file."""
    file = folder / WEIGHTS
    if file.is_file():
        partial = file.with_suffix(".partial")
        save_tensors(load_file(file), partial, **metadata)
        partial.replace(file)


def saved_base_of(adapter: Path) -> Path | None:
    """Return `quantized/` of the run that contains an adapter, if it is the adapter's base.

    A run directory may have been moved since its adapters recorded the path of their base.

    Args:
        adapter: The folder `adapter/` of a run, or one of its checkpoints.
    """
    trained_on = recorded_fingerprint(read_metadata(adapter / WEIGHTS))
    parents = Path(os.path.abspath(adapter)).parents[:2] if trained_on else ()
    for folder in (RunLayout(parent).quantized for parent in parents):
        try:
            if read_quantized_settings(folder).fingerprint == trained_on:
                return folder
        except UserError:
            continue
    return None


def base_fingerprint(model: PreTrainedModel) -> str | None:
    """Return the fingerprint of a quantized model; None if it is none.

    It is the recorded one, if there is any, also that of a model that was dequantized. Otherwise
    it is computed from the weights.
    """
    config: Any = model.config
    if not any(isinstance(module, HQQLinear) for module in model.modules()):
        return getattr(config, BASE_FINGERPRINT, None)
    recorded = getattr(config, "quantization_config", None) or {}
    recorded = recorded if isinstance(recorded, dict) else recorded.to_dict()
    return recorded.get("fingerprint") or fingerprinted(model).fingerprint


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of an adapter's weights; of a damaged file none, which PEFT refuses."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.metadata() or {}
    except (SafetensorError, OSError):
        return {}
