"""The settings with which transformers generates a text: the model's own, and those of the caller.

A folder's generation_config.json may also ask for beams, several texts or another cache. A text
that is streamed is a single one, so only the keys in `_OF_THE_MODEL` are taken from that file.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import CompileConfig, GenerationConfig

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import load_json
from hqqtrain.compat import compile_on_every_device
from hqqtrain.config.field import field_errors
from hqqtrain.config.generate import GenerateConfig
from hqqtrain.config.typed_group import build_group

CACHE_TOKENS = 1024
"""A static cache has a multiple of this number of tokens, so that few lengths are compiled."""

_ID_LISTS = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_INTEGERS = ("bos_token_id", "pad_token_id", "top_k", "no_repeat_ngram_size")
_NUMBERS = (
    "temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty",
)  # fmt: skip
_OF_THE_MODEL = ("do_sample", *_ID_LISTS, *_INTEGERS, *_NUMBERS)
"""Keys of generation_config.json that have an effect here."""

_FILTERS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Keys that leave some tokens out when one is chosen at random."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How each token is chosen. A setting that is None is the model's own.

    Attributes:
        temperature: Divides the logits; 0: the most likely token is always taken.
        top_k: Number of most likely tokens to choose from; 0: all.
        top_p: Choose from the most likely tokens that together have this probability.
        min_p: Choose from the tokens with at least this share of the highest probability.
        repetition_penalty: Above 1, tokens that occur in the text already become less likely.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def as_generation_keys(self) -> dict[str, Any]:
        """Return the settings that are given, as keys of transformers."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if given.get("temperature") == 0:
            penalty = {k: v for k, v in given.items() if k == "repetition_penalty"}
            return {"do_sample": False, **dict.fromkeys(("temperature", *_FILTERS)), **penalty}
        if given.keys() - {"repetition_penalty"}:
            given["do_sample"] = True
        return given


SAMPLING_OF_THE_MODEL = Sampling()
"""No setting is given."""


def check_settings(values: Mapping[str, Any]) -> None:
    """Check settings of `hqqtrain.generate` like the keys of the group `generate`.

    Args:
        values: Values by the names of the keys.

    Raises:
        UserError: A value has another type, or is not allowed.
    """
    config = build_group(GenerateConfig, values, "generate")
    if errors := [*field_errors("generate", config), *config.errors()]:
        raise UserError("\n".join(errors))


def read_generation_config(file: Path) -> GenerationConfig:
    """Read a generation_config.json; a missing file has no settings.

    Raises:
        UserError: The file is not a JSON object, or has a value that transformers refuses.
    """
    if not file.exists():
        return GenerationConfig()
    try:
        content = load_json(file)
        if not isinstance(content, dict):
            raise ValueError("it must contain a JSON object")
        known = {k: v for k, v in content.items() if k in _OF_THE_MODEL and v is not None}
        for key, value in known.items():
            if not _has_type(key, value):
                raise ValueError(f"{key}={value!r} has a wrong type")
        return GenerationConfig(**known)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be used ({error}); correct it, or remove it.") from error


def _has_type(key: str, value: Any) -> bool:
    """Whether a value of generation_config.json has its type, which transformers does not check."""
    if key in _ID_LISTS and isinstance(value, list):
        return all(type(item) is int for item in value)
    if key in _NUMBERS:
        return type(value) in (int, float) and isfinite(value)
    return type(value) is (bool if key == "do_sample" else int)


def merged_generation_config(
    own: GenerationConfig,
    sampling: Sampling,
    ends: Collection[int],
    *,
    max_new_tokens: int,
    cache_tokens: int | None,
    compile_anywhere: bool,
) -> GenerationConfig:
    """Return the settings for one text.

    Args:
        own: The settings of the model.
        sampling: How tokens are chosen; settings that are given replace those of the model.
        ends: The ids of tokens that end a text, in addition to those of `own`.
        max_new_tokens: Largest number of tokens to generate.
        cache_tokens: Number of tokens of a static cache, with which transformers compiles the
            model; None: a cache that grows, and no compilation.
        compile_anywhere: Whether a CPU compiles, too.
    """
    settings = {key: getattr(own, key, None) for key in _OF_THE_MODEL}
    settings |= sampling.as_generation_keys()
    eos = settings["eos_token_id"]
    eos = [*eos] if isinstance(eos, list | tuple) else [eos]
    eos = sorted({*ends, *(id for id in eos if id is not None)})
    settings["eos_token_id"] = eos or None
    if settings["pad_token_id"] is None and eos:  # transformers would say so at every call
        settings["pad_token_id"] = eos[0]
    config = GenerationConfig(
        **settings, max_new_tokens=max_new_tokens, num_beams=1, num_return_sequences=1,
        use_cache=True, return_dict_in_generate=False,
    )  # fmt: skip
    if cache_tokens is None:
        config.disable_compile = True
        return config
    config.cache_implementation = "static"
    if hasattr(config, "max_cache_len"):  # since transformers 5.13
        config.max_cache_len = cache_tokens
    if compile_anywhere:
        config.compile_config = compile_on_every_device(CompileConfig(mode="default"))
    return config
