"""Check that an adapter belongs to the model before PEFT or transformers load it.

PEFT writes no metadata, so an adapter that is loaded and saved again would no longer record its
base. The metadata is therefore kept with PEFT's configuration of the adapter, and written again. An
adapter that was not loaded records the model that it is saved from, if that is quantized.

Only public functions are extended. This module is imported while their libraries are, so it imports
the rest of hqqtrain only when it is called.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

_DOWNLOAD = ("cache_dir", "proxies", "token", "revision", "local_files_only", "subfolder")
"""Arguments that say which file of which repository is read."""

_BASE = "hqqtrain_base"
"""Attribute of PEFT's configuration of a loaded adapter: the metadata that records its base."""


def extend_peft_model() -> None:
    """Let `PeftModel` check the base before it loads an adapter, and record it when it saves."""
    from peft import peft_model

    _check_before(peft_model.PeftModel, "load_adapter", "model_id")
    _record_after_saving(
        peft_model.PeftModel,
        lambda model, folder: {
            name: folder if name == "default" else folder / name for name in model.peft_config
        },
    )


def extend_peft_config() -> None:
    """Let an adapter of a run directory name the base there, also after the directory was moved."""
    from peft import config as peft_config

    mixin: Any = peft_config.PeftConfigMixin
    function = mixin.from_pretrained.__func__  # the class method without its class

    @wraps(function)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        config = function(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            from hqqtrain.formats.adapter_base import saved_base_of

            if base := saved_base_of(folder):
                config.base_model_name_or_path = str(base)
        return config

    mixin.from_pretrained = classmethod(from_pretrained)


def extend_hotswap() -> None:
    """Let `hotswap_adapter` check the base first."""
    from peft.utils import hotswap

    _check_before(hotswap, "hotswap_adapter", "model_name_or_path")


def extend_transformers() -> None:
    """Let `PreTrainedModel.load_adapter` and `from_pretrained` of an adapter check the base."""
    from transformers.integrations import peft

    _check_before(peft.PeftAdapterMixin, "load_adapter", "peft_model_id")


def extend_pretrained_model() -> None:
    """Let `PreTrainedModel.save_pretrained` record the base of an adapter."""
    from transformers import modeling_utils

    _record_after_saving(
        modeling_utils.PreTrainedModel,
        lambda model, folder: dict.fromkeys(model.active_adapters(), folder),
    )


def _check_before(owner: Any, name: str, model_id: str) -> None:
    """Let a function of `owner` check the base of the adapter that it is called for.

    Args:
        owner: A module or class, changed in place.
        name: The function, whose first argument is the model.
        model_id: Its argument with the folder or the hub name of the adapter.
    """
    load: Callable[..., Any] = getattr(owner, name)
    signature = inspect.signature(load)

    @wraps(load)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        model, adapter = next(iter(given.values())), given.get(model_id)
        base: dict[str, str] = {}
        if adapter is not None and (file := _adapter_file(adapter, _download_options(given))):
            from hqqtrain.formats.adapter_base import check_base_of

            base = check_base_of(model, file, str(adapter))
        result = load(*args, **kwargs)
        config = model.peft_config.get(given.get("adapter_name") or "default")
        if config is not None:
            setattr(config, _BASE, base)
        return result

    setattr(owner, name, checked)


def _record_after_saving(owner: Any, folders_of: Callable[[Any, Path], Mapping[str, Path]]) -> None:
    """Let `save_pretrained` of a class record the bases of the adapters that it saves.

    Args:
        owner: The class, changed in place.
        folders_of: Returns the folder of each adapter, by name, for a model and the folder to which
            it was saved.
    """
    save: Callable[..., Any] = owner.save_pretrained

    @wraps(save)
    def save_and_record(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_directory, *args, **kwargs)
        configs = getattr(self, "peft_config", None) or {}
        if configs and kwargs.get("is_main_process", True):
            from hqqtrain.formats.adapter_base import base_metadata, record_base

            for name, folder in folders_of(self, Path(save_directory)).items():
                loaded = getattr(configs.get(name), _BASE, None)
                if base := base_metadata(self) if loaded is None else loaded:
                    record_base(folder, base)
        return result

    owner.save_pretrained = save_and_record


def _download_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `cached_file` among those of a function that loads an adapter."""
    parts = [getattr(given.get("load_config"), "download_kwargs", None),
             given.get("adapter_kwargs"), given.get("kwargs"), given]  # fmt: skip
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= {k: v for k, v in (part or {}).items() if k in _DOWNLOAD and v is not None}
    return merged


def _adapter_file(adapter: str | os.PathLike, options: Mapping[str, Any]) -> Path | None:
    """Return the adapter_model.safetensors of a folder or repository; None if it has none."""
    from transformers.utils import cached_file

    from hqqtrain.formats.adapter_config import WEIGHTS

    try:
        file = cached_file(adapter, WEIGHTS, **options)
    except (OSError, ValueError):  # the library reports what it cannot find
        return None
    return Path(file) if file else None
