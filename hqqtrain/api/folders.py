"""`load_quantized` and `save_quantized`: folders like `quantized/` of a run."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hqqtrain.api.arguments import (
    checked_group,
    folder_argument,
    named_as_arguments,
)
from hqqtrain.common.cache_entry import lock_path
from hqqtrain.common.errors import UserError
from hqqtrain.common.filelock import try_lock
from hqqtrain.common.packed_folders import gguf_files
from hqqtrain.config.model import ModelConfig
from hqqtrain.config.public_function import public_function
from hqqtrain.formats import packed
from hqqtrain.formats.adapter_config import CONFIG, WEIGHTS
from hqqtrain.formats.packed import fingerprinted, model_tensors
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.inference.backends.base import RepackedLinear
from hqqtrain.inference.merged_linears import MergedLinear
from hqqtrain.models import offload
from hqqtrain.models.source import ModelSource, resolve_source
from hqqtrain.models.weights.safetensors import SafetensorsReader, open_safetensors
from hqqtrain.quant.spec import DTYPES
from hqqtrain.rundir.layout import RunLayout


@public_function()
def load_quantized(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    adapter: str | os.PathLike[str] | bool = True,
    is_trainable: bool = False,
    offload_meta: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a quantized model, bit for bit, with the adapter of its run.

    The checksums of the files, or the fingerprint of the packed weights, are checked while they
    load, and so is the base of the adapter.

    Args:
        folder: The directory of a run; a folder like its `quantized/`; or the name of one on the
            hub.
        device: Where to load the model, or a `device_map` of transformers such as `auto`; None: on
            the CPU.
        dtype: The dtype that the model computes in, of PyTorch or its name, such as `bf16`; `auto`:
            that of the folder's config.json. The packed weights do not change.
        adapter: The folder of a PEFT adapter; true: the one of the run, if `folder` is a run that
            has one; false: none.
        is_trainable: Whether the adapter can be trained further.
        offload_meta: Whether scale and zero stay in host memory, and are copied to the GPU ahead of
            their use. The GPU does not have them while the model is loaded, either, unless `device`
            is a `device_map`.

    Returns:
        The model of transformers, or with an adapter PEFT's model around it, in evaluation mode
        unless the adapter is trained.

    Raises:
        UserError: The folder is missing, damaged or not quantized by hqqtrain, or the adapter has
            another base.
    """
    with named_as_arguments(
        "load_quantized", folder="model.name_or_path", adapter="adapter.init_from"
    ):
        source = quantized_source(folder)
        if adapter is True and source.lacks_adapter:
            raise UserError(
                f"folder={folder}: the run has not finished its adapter; finish it, or give the "
                "folder of one of its checkpoints as adapter, or adapter=False."
            )
        if isinstance(dtype, str):
            dtype = DTYPES.get(dtype, dtype)
        _check_dtype(dtype)
        chosen = source.adapter if adapter is True else adapter or None
        if chosen is not None:
            _check_adapter(chosen)
        SafetensorsReader(source.path)  # says which file is missing or damaged
        moves = offload_meta and _is_one_device(device)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, device_map=None if moves else device
        )
        if offload_meta:
            offload.offload_meta(model)
        if moves:
            model.to(device)
        if chosen is None:
            return model
        adapted = PeftModel.from_pretrained(model, os.fspath(chosen), is_trainable=is_trainable)
        return adapted.train(is_trainable)


def _check_adapter(adapter: Any) -> None:
    """Check that a local folder has an adapter; the Hub is asked for a name such as `user/name`.

    Raises:
        UserError: It has none, or one that is damaged.
    """
    path, name = Path(adapter), os.fspath(adapter)
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not (path / CONFIG).is_file() and (path.exists() or not is_hub_name):
        reason = f"has no {CONFIG}, so it is no PEFT adapter" if path.exists() else "no such folder"
        raise UserError(f"adapter={adapter}: {reason}.")
    if (path / WEIGHTS).exists():
        open_safetensors(path / WEIGHTS)
    elif path.exists() and not (path / "adapter_model.bin").exists():
        raise UserError(f"adapter={adapter}: has no {WEIGHTS}; copy the adapter again.")


def _check_dtype(dtype: torch.dtype | str) -> None:
    """Check that `dtype` is `auto`, or one that a model can compute in.

    Raises:
        UserError: It is not.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UserError(
            f"dtype={dtype}: must be auto, {', '.join(DTYPES)}, or a floating-point dtype of "
            "PyTorch."
        )


def _is_one_device(device: torch.device | str | None) -> bool:
    """Whether a value of `load_quantized` names a device and is no `device_map`."""
    try:
        return device is not None and bool(torch.device(device))
    except (RuntimeError, TypeError):
        return False


def quantized_source(folder: str | os.PathLike[str]) -> ModelSource:
    """Return the source of the quantized model in a folder.

    Raises:
        UserError: It is missing, or hqqtrain has not quantized it.
    """
    source = resolve_source(checked_group(ModelConfig, "model", {"name_or_path": folder}))
    if source.kind != "quantized" or source.foreign:
        program = f"quantized by another program ({source.foreign})" if source.foreign else "dense"
        raise UserError(
            f"model.name_or_path={folder}: is {program}; load_quantized loads what hqqtrain has "
            "quantized. Load a dense model with transformers and call quantize_model; take over "
            "the weights of another program with the command line, task=quantize."
        )
    return source


@public_function(model=nn.Module, tokenizer=PreTrainedTokenizerBase)
def save_quantized(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a quantized model into a folder like `quantized/` of a run, completely or not at all.

    hqqtrain loads it, and transformers after `import hqqtrain`. It has the fingerprint of the
    packed weights and the checksums of all files. Adapters are left out: `model.save_pretrained` of
    PEFT saves them. Those that are saved afterwards name this folder as their base.

    Args:
        model: A quantized model of transformers, with or without adapters, in memory.
        folder: The folder to create.
        tokenizer: The tokenizer to save with the model.
        overwrite: Whether the folder may have a model. All that is in it is then deleted.

    Raises:
        UserError: Nothing in the model is quantized, or the folder exists.
    """
    with named_as_arguments("save_quantized"):
        base = transformers_model(model)
        settings = whole_settings(base)
        if not settings.modules:
            raise UserError("model has no quantized layer; call quantize_model first.")
        with new_folder(folder, overwrite=overwrite) as path, companions(base, tokenizer) as source:
            packed.save_quantized(
                model_tensors(base),
                path,
                hf_config=dense_config(base),
                settings=settings,
                source=source,
            )
    base.name_or_path = str(path)
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = str(path)


def transformers_model(model: nn.Module) -> Any:
    """Return the model of transformers inside its wrappers.

    Raises:
        UserError: There is none.
    """
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise UserError(
            f"model is a {type(model).__name__}; only a model of transformers has a config.json."
        )
    return found


def dense_config(model: Any) -> Any:
    """Return a copy of the configuration of a model that does not say that it is quantized."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def whole_settings(model: nn.Module) -> QuantizedSettings:
    """Return the settings of the quantized layers of a model, with their fingerprint.

    Raises:
        UserError: Some weights are not in memory, or the model was prepared for inference.
    """
    prepared = (MergedLinear, RepackedLinear)
    if any(isinstance(module, prepared) for module in model.modules()):
        raise UserError(
            "model was changed by prepare_for_inference, which merges layers and may repack them; "
            "save or export it before, or load it again."
        )
    if missing := next((name for name, p in model.named_parameters() if p.is_meta), None):
        raise UserError(
            f"model has layers on disk, such as {missing}; load it with a device_map without disk."
        )
    return fingerprinted(model)


@contextmanager
def new_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield the full path of a folder to create, which nobody else may write meanwhile.

    Raises:
        UserError: It exists and has files, which may not be deleted, or are not those of a model;
            it cannot be written to, or somebody else writes it now, such as another rank.
    """
    path = folder_argument(folder)
    if not path.name:
        raise UserError(f"folder={folder}: exists; give another name.")
    try:
        lock = try_lock(lock_path(path))
    except OSError as error:
        raise UserError(f"folder={folder}: cannot be written to ({error}).") from error
    if lock is None:
        raise UserError(f"folder={folder}: somebody else writes it now; save from one rank only.")
    with lock:
        try:
            _check_replaceable(path, folder, overwrite=overwrite)
            yield path
        finally:
            lock_path(path).unlink(missing_ok=True)


def _check_replaceable(path: Path, folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check that what is at `path` may be replaced; `folder` is the value of the argument."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise UserError(f"folder={folder}: exists; give another name, or overwrite=True.")
    run = RunLayout(path.parent)
    if run.config_yaml.is_file() and run.status_json.is_file():
        raise UserError(f"folder={folder}: is a result of the run {run.folder}; give another name.")
    # A mistake in the name must not delete a home or a project.
    if not (path / "config.json").is_file() and not gguf_files(path):
        raise UserError(
            f"folder={folder}: has files, but no model, and is not deleted; give another name, or "
            "remove it yourself."
        )


@contextmanager
def companions(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Path]:
    """Yield a temporary folder with the tokenizer and the generation settings of a model."""
    with TemporaryDirectory(prefix="hqqtrain-") as folder:
        if tokenizer is not None:
            if not hasattr(tokenizer, "save_pretrained"):
                kind = type(tokenizer).__name__
                raise UserError(f"tokenizer is a {kind}; it must be a tokenizer of transformers.")
            tokenizer.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        yield Path(folder)
