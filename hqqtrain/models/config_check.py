"""Check a model's config.json before a model is built from it.

The file is other people's data. transformers believes it: a layer count of 10^8 would build modules
until the memory is full, and an attention implementation that names a repository of the hub would
download code and run it.
"""

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from hqqtrain.common.errors import UserError
from hqqtrain.compat import implementations


class _Range(NamedTuple):
    """The allowed values of the numbers whose names match `pattern`."""

    pattern: re.Pattern[str]
    low: float
    high: float


_RANGES = (
    _Range(re.compile(r"^(num|n)_(hidden_|decoder_)?layers?$|^decoder_layers$"), 1, 1 << 11),
    _Range(re.compile(r"^(num|n)_\w*(layer|block)s?$|_layers$|^depth$"), -(1 << 11), 1 << 11),
    _Range(
        re.compile(r"_(size|dim|width|features|positions?|embeddings|embd|ctx)s?$"), -1, 1 << 31
    ),
    _Range(re.compile(r"^num_labels$"), -1, 1 << 16),
    _Range(re.compile(r"^(num|n)_"), -1, 1 << 20),
    _Range(re.compile(r"(_eps|_epsilon)$"), 0, 1),
    _Range(re.compile(r"(^|_)(dropout|pdrop|layerdrop|prob|(drop|dropout)_rate)$"), 0, 1),
    _Range(re.compile(r"^(short_|long_)?factor$"), 1e-6, 1e9),
    _Range(re.compile(r"^rope_theta$|^rotary_emb_base$"), 1e-6, 1e15),
)
"""Numbers that transformers would believe, although no model has them. The first match counts.

Some models use -1 for a size that is not limited. Other wrong numbers are refused when the model is
built, because PyTorch cannot make such a tensor.
"""

_MAX_NESTING = 64

_ATTENTION_PACKAGES = {
    "eager": None, "sdpa": None, "flex_attention": None, "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface", "flash_attention_4": "flash_attn.cute",
}  # fmt: skip
"""Implementations of attention in transformers -> the package that they need."""

_EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""Implementations of experts in transformers that need no code from the hub."""


def check_config_json(path: Path, config_json: Mapping[str, Any]) -> None:
    """Check the numbers in a config.json, at any depth.

    Args:
        path: The file, for messages.
        config_json: Its content.

    Raises:
        UserError: A number is NaN or out of range, or the file is nested too deeply.
    """
    for key, value in _leaves(path, config_json):
        name = key.rpartition(".")[2]
        allowed = next((r for r in _RANGES if r.pattern.search(name)), None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value != value:
            raise UserError(
                f"{path}: {key}={value} is not a number; use the config.json that was saved with "
                "the weights."
            )
        if allowed is None:
            continue
        if not allowed.low <= value <= allowed.high:
            raise UserError(
                f"{path}: {key}={value} is not between {allowed.low:g} and {allowed.high:g}; use "
                "the config.json that was saved with the weights."
            )


def check_implementations(path: Path, config: PretrainedConfig) -> None:
    """Check that attention and experts use code that is installed already.

    Args:
        path: The config.json, for messages.
        config: The configuration that was read from it.

    Raises:
        UserError: An implementation is unknown, names a kernel of the hub, or is not installed.
    """
    for part in _parts(config):
        attention, experts = implementations(part)
        if attention is not None and attention not in _ATTENTION_PACKAGES:
            raise UserError(
                f"{path}: attn_implementation={attention}: not one of "
                f"{', '.join(_ATTENTION_PACKAGES)}. A name of the hub would download code and "
                "run it, which hqqtrain never does. Remove the entry from config.json."
            )
        package = _ATTENTION_PACKAGES.get(attention or "eager")
        if package and not _is_installed(package):
            raise UserError(
                f"{path}: attn_implementation={attention} needs the package {package}, which is "
                "not installed. Remove the entry from config.json, or install the package."
            )
        if experts is not None and experts not in _EXPERTS_IMPLEMENTATIONS:
            raise UserError(
                f"{path}: experts_implementation={experts}: not one of "
                f"{', '.join(_EXPERTS_IMPLEMENTATIONS)}. Remove the entry from config.json."
            )


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield `config` and the configurations inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _leaves(path: Path, value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of everything in a JSON value that is neither a list nor an object."""
    if depth > _MAX_NESTING:
        raise UserError(f"{path}: {key[:60]}... is nested more than {_MAX_NESTING} levels deep.")
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(path, item, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(path, item, key, depth + 1)
    else:
        yield key, value


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of the package is missing
        return False
