"""Read adapter_config.json of an adapter that computes exactly `W x + scaling * B A x`.

PEFT writes the same two matrices for many other kinds of adapters. Some of them change the base
weights when they are made (PiSSA), others act on some tokens only (aLoRA) or save further tensors
(DoRA). Taken as plain LoRA they would compute something else, so every key of the file must be
understood, and the one that asks for more is named.
"""

import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import peft
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import load_json
from hqqtrain.common.time_limit import time_limit

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PATTERN_SECONDS = 2.0
"""Seconds that the patterns of an adapter may take; those of PEFT's users take microseconds.

`--check` reads an adapter twice.
"""

_WITHOUT_EFFECT = frozenset([
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
])  # fmt: skip
"""Keys that do not change what an adapter computes.

Some of them only say how the matrices were initialized; `init_lora_weights` decides there.
"""

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` with which PEFT leaves the base weights as they are."""

_REASONS = {
    "alora_invocation_tokens": "the adapter acts only on the tokens after these",
    "bias": "biases of the base are trained, too",
    "layer_replication": "layers of the base are repeated",
    "lora_bias": "the matrices B have biases",
    "target_parameters": "parameters that are not linear layers are adapted",
    "use_dora": "the norms of the weights' rows are trained, too (DoRA)",
}
"""The meaning of the keys that are refused most often."""


class LoraShape(NamedTuple):
    """The sizes of the matrices of one adapted linear layer: A [r, in], B [out, r]."""

    r: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"A [{self.r}, {self.in_features}] and B [{self.out_features}, {self.r}]"


def read_adapter_config(path: Path, origin: str) -> LoraConfig:
    """Read PEFT's configuration of a plain LoRA adapter.

    Args:
        path: The file.
        origin: The beginning of messages, such as the folder.

    Raises:
        UserError: The file is not a configuration of PEFT, or the adapter is not plain LoRA.
    """
    values = _read_json(path, origin)
    if values.get("peft_type") != "LORA":
        raise UserError(
            f"{origin}: {CONFIG} has peft_type={_shown(values.get('peft_type'))}: must be LORA, "
            "the only type of adapter that hqqtrain reads."
        )
    for key, value in values.items():
        _check_key(key, value, origin)
    known = {key: value for key, value in values.items() if key in _TYPES or key in _NAMES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about combinations with settings that have no effect here
        try:
            return LoraConfig(**{key: v for key, v in known.items() if v is not None})
        except (ValueError, TypeError) as error:
            raise UserError(f"{origin}: {CONFIG}: not a PEFT configuration ({error}).") from error


def resolve_patterns(
    config: LoraConfig, layers: Mapping[str, LoraShape],
    linears: Mapping[str, tuple[int, int]] | None, origin: str,
) -> LoraConfig:  # fmt: skip
    """Return the same configuration with full module names in place of all patterns.

    Args:
        config: The configuration that the file contains.
        layers: The adapted modules, as the tensors say.
        linears: (out_features, in_features) of the linear layers of the model that may have an
            adapter; None: the adapter is for no model in particular.
        origin: The beginning of messages.

    Raises:
        UserError: The configuration contradicts the tensors or the model.
    """
    try:
        with time_limit(_PATTERN_SECONDS):
            selected = _selected_modules(config, layers.keys(), {*layers, *(linears or ())})
            ranks = _values_of(config.rank_pattern, config.r, layers.keys())
            alphas = _values_of(config.alpha_pattern, config.lora_alpha, layers.keys())
    except (re.error, TimeoutError, RecursionError, OverflowError) as error:
        raise UserError(
            f"{origin}: {CONFIG}: a pattern of target_modules, exclude_modules, layers_pattern, "
            f"rank_pattern or alpha_pattern cannot be used ({error})."
        ) from error
    for name, shape in sorted(layers.items()):
        if name not in selected:
            raise UserError(
                f"{origin}: {WEIGHTS} has matrices of {name}, which target_modules of {CONFIG} "
                "does not select; the two files belong to different adapters."
            )
        if ranks[name] != shape.r:
            raise UserError(
                f"{origin}: {name} has {shape}, but {CONFIG} gives it the rank {ranks[name]}."
            )
        if linears is not None:
            _check_fits(name, shape, linears, origin)
    if missing := sorted(selected - layers.keys()):
        raise UserError(
            f"{origin}: {WEIGHTS} has no matrices of {missing[0]}, which target_modules of "
            f"{CONFIG} selects; the adapter is incomplete, or belongs to another model."
        )
    return LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora,
        rank_pattern={name: r for name, r in ranks.items() if r != config.r},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha},
        target_modules=sorted(layers), task_type="CAUSAL_LM", revision=config.revision,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=config.inference_mode,
    )  # fmt: skip


def _check_fits(
    name: str, shape: LoraShape, linears: Mapping[str, tuple[int, int]], origin: str
) -> None:
    if name not in linears:
        raise UserError(
            f"{origin}: adapts {name}, which is not a linear layer of this model that may have an "
            "adapter; the adapter belongs to another model, or quant.skip excludes this layer."
        )
    if linears[name] != (shape.out_features, shape.in_features):
        raise UserError(
            f"{origin}: {name} has {shape}, but its weight is {list(linears[name])}; the adapter "
            "belongs to another model."
        )


def _selected_modules(config: LoraConfig, adapted: Set[str], names: Set[str]) -> set[str]:
    """Return those of `names` that PEFT adapts; the `adapted` ones if it depends on the model."""
    if config.target_modules in (None, "all-linear"):
        return set(adapted)
    return {name for name in names if check_target_module_exists(config, name)}


def _values_of(patterns: Mapping[str, Any] | None, default: Any, names: Set[str]) -> dict[str, Any]:
    """Return the value of each module: that of the first pattern that matches, as in PEFT."""
    patterns = patterns or {}
    return {name: patterns.get(get_pattern_key(list(patterns), name), default) for name in names}


def _read_json(path: Path, origin: str) -> dict[str, Any]:
    try:
        values = load_json(path)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{origin}: {CONFIG}: not a PEFT configuration ({error}).") from error
    return values


def _check_key(key: str, value: Any, origin: str) -> None:
    """Refuse a value of a wrong type, and a key that asks for more than plain LoRA."""
    shown = f"{origin}: {CONFIG} has {key}={_shown(value)}"
    if key in _TYPES:
        is_allowed, allowed = _TYPES[key]
        if not is_allowed(value):
            raise UserError(f"{shown}: must be {allowed}.")
    elif key == "init_lora_weights":
        # Compare without case as PEFT does, and by type, because 1 == True.
        lowered = value.lower() if isinstance(value, str) else value
        if not any(type(lowered) is type(init) and lowered == init for init in _PLAIN_INITS):
            raise UserError(
                f"{shown}: this initialization changes the weights of the base, and the adapter "
                "fits only those. Convert it to plain LoRA with PEFT: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )
    elif key == "task_type":
        if value not in (None, "CAUSAL_LM"):
            raise UserError(f"{shown}: must be CAUSAL_LM, the task of the models here.")
    elif key not in _WITHOUT_EFFECT and key != "peft_type" and not _is_default(key, value):
        if key not in LoraConfig.__dataclass_fields__:
            raise UserError(
                f"{shown}: PEFT {peft.__version__}, which is installed, does not know this key. "
                "Install a later one, or remove the key if it has no effect on this adapter."
            )
        reason = _REASONS.get(key, "it is more than LoRA")
        raise UserError(
            f"{shown}: {reason}. hqqtrain reads plain LoRA; use an adapter that was trained "
            f"without {key}."
        )


def _is_default(key: str, value: Any) -> bool:
    """Whether `value` switches nothing on. A key of a later PEFT must be null, false or empty."""
    if value is None or value is False or value in ("", [], {}):
        return True
    field = LoraConfig.__dataclass_fields__.get(key)
    return field is not None and field.default == value and type(field.default) is type(value)


def _shown(value: Any) -> str:
    """Return a JSON value for a message, cut off if it is long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_integer(value: Any, low: int) -> bool:
    return type(value) is int and value >= low


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def _is_mapping(value: Any, is_value: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, Mapping) and all(map(is_value, value.values())))


def _is_names(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(item, str) for item in items)


def _is_indices(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return value is None or all(_is_integer(item, 0) for item in items)


def _lists_of(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value] if value else []


_NAMES = ("base_model_name_or_path", "revision", "inference_mode", "task_type")
"""Further keys that `LoraConfig` gets."""

_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: _is_integer(value, 1), "an integer of at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "use_rslora": (lambda value: value in (None, True, False), "true or false"),
    "rank_pattern": (
        lambda value: _is_mapping(value, lambda rank: _is_integer(rank, 1)),
        "a mapping of patterns to integers of at least 1",
    ),
    "alpha_pattern": (
        lambda value: _is_mapping(value, _is_number), "a mapping of patterns to numbers"
    ),
    "target_modules": (_is_names, "a string or a list of strings"),
    "exclude_modules": (_is_names, "a string or a list of strings"),
    "layers_to_transform": (_is_indices, "an integer or a list of integers"),
    "layers_pattern": (_is_names, "a string or a list of strings"),
    "modules_to_save": (
        lambda value: value is None or (isinstance(value, list) and _is_names(value)),
        "a list of strings",
    ),
    "trainable_token_indices": (
        lambda value: isinstance(value, dict | list | None) and all(
            isinstance(ids, list) and ids and _is_indices(ids) for ids in _lists_of(value)
        ),
        "a list of token ids, or a mapping of modules to such lists",
    ),
}  # fmt: skip
"""Keys that say what plain LoRA computes: their check and their allowed values."""
