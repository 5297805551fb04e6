"""Check the files of a quantized model before transformers reads them.

transformers gives random values to tensors that are missing, and does not look at checksums. This
module is imported when a model is loaded.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.formats.manifest import is_sealed
from hqqtrain.formats.packed import check_quantized, fingerprinted
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear


def check_files(files: Sequence[str | Path], modules: Iterable[str]) -> bool:
    """Check the files of a quantized model.

    Args:
        files: The safetensors files; none if the model is loaded from a state dict.
        modules: The quantized layers, by their names in the files.

    Returns:
        Whether the folder has a manifest, whose checksums were verified.

    Raises:
        UserError: A tensor is missing, or a file was changed after it was written.
    """
    if not files:
        return False
    folder = Path(files[0]).parent
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    expected = [f"{name}.{attribute}" for name in modules for attribute in PACKED_PARAMETERS]
    missing = [name for name in expected if name not in shapes]
    if missing and len(shapes.get(f"{missing[0].rpartition('.')[0]}.weight", ())) == 2:
        raise UserError(
            f"{folder}: has a dense {missing[0].rpartition('.')[0]}, which is quantized according "
            "to its config.json: it was saved by a model that from_pretrained has not loaded. "
            "Remove quantization_config from config.json, and quantize again."
        )
    if missing:
        raise UserError(
            f"{folder}: has no {missing[0]} ({len(missing)} tensors of quantized "
            "layers are missing). Copy the folder again, or quantize again."
        )
    if not is_sealed(folder):  # `save_pretrained` writes no manifest
        return False
    advice = "Copy the folder again. If you have changed the file yourself, delete manifest.json."
    check_quantized(folder, SINGLE_PROCESS, advice)
    return True


def check_fingerprint(
    model: nn.Module, settings: QuantizedSettings, stored_names: dict[str, str]
) -> None:
    """Compare the packed weights of a loaded model with the fingerprint in its config.json.

    Layers on disk and a head that the model lacks cannot be compared.

    Args:
        model: The loaded model.
        settings: The settings in config.json.
        stored_names: The names of the layers in the model -> in the files.

    Raises:
        UserError: They differ.
    """
    if len(stored_names) < len(settings.modules) or not _is_whole(model):
        return
    found = fingerprinted(model, stored_names).fingerprint
    if found != settings.fingerprint:
        raise UserError(
            f"{getattr(model, 'name_or_path', 'model')}: its packed weights are {found}, but "
            f"config.json was written for {settings.fingerprint}: a file was altered. Copy the "
            "folder again, or quantize again."
        )


def current_settings(model: nn.Module, recorded: QuantizedSettings) -> QuantizedSettings:
    """Return the settings of a model that is saved, some of whose layers may have been replaced.

    Args:
        model: The model.
        recorded: Its settings when it was loaded.

    Raises:
        UserError: Its layers are no longer those, and their weights are on disk or sharded.
    """
    settings = QuantizedSettings.from_model(model)
    if _is_whole(model):
        return fingerprinted(model)
    if settings.modules != recorded.modules:
        raise UserError(
            "save_pretrained: layers of the model were replaced, so its fingerprint must be "
            "computed again, but not all weights are in memory; load it without layers on disk."
        )
    return recorded


def _is_whole(model: nn.Module) -> bool:
    """Whether this process has all packed weights of a model in memory."""
    params = [module.W_q for module in model.modules() if isinstance(module, HQQLinear)]
    return not any(param.is_meta or isinstance(param, DTensor) for param in params)
