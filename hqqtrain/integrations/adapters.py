"""Check that an adapter belongs to the model before PEFT or transformers load it.

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


def extend_peft_model() -> None:
    """Let `PeftModel.load_adapter` and `from_pretrained` check the base first."""
    from peft import peft_model

    _check_before(peft_model.PeftModel, "load_adapter", "model_id")


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
        adapter, options = given.get(model_id), _download_options(given)
        if adapter is not None and (file := _adapter_file(adapter, options)):
            from hqqtrain.formats.adapter_base import check_base_of

            check_base_of(args[0], file, str(adapter))
        return load(*args, **kwargs)

    setattr(owner, name, checked)


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
