"""Settings that a command gives and its task does not use.

Recipes set keys for several tasks, so only keys of the command line are looked at. Such a setting
is no error, because the same words may start a training and then its evaluation, but the user is
told.
"""

from collections.abc import Collection, Iterator
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from hqqtrain.config.data_sources import describe_source, source_paths
from hqqtrain.config.export import ExportConfig
from hqqtrain.config.generate import GenerateConfig
from hqqtrain.config.groups import AUTO, BUILT_IN_SOURCES
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.run import RunConfig

_EVERY_TASK = (
    "task", "recipe", "model", "model.*", "quant", "quant.*", "parallel", "parallel.*", "launch",
    "launch.*", "run", "run.*", "train.precision",
)  # fmt: skip

USED_KEYS = {
    "finetune": ("*",),
    "quantize": (*_EVERY_TASK, "hub", "hub.*"),
    "eval": (
        *_EVERY_TASK, "adapter.init_from", "adapter.dtype", "data", "data.*", "eval", "eval.*",
        "train.max_seq_len", "train.micro_batch_size",
    ),
    "export": (
        *_EVERY_TASK, "adapter.init_from", "adapter.dtype", "export", "export.*", "data", "data.*",
        "eval.source", "eval.tokens", "eval.protocol", "train.max_seq_len",
        "train.micro_batch_size", "hub", "hub.*",
    ),
    "generate": (
        "task", "recipe", "model", "model.*", "quant", "quant.*", "generate", "generate.*",
        "adapter.init_from", "data.chat_template", "data.add_tokens", "train.precision",
        "parallel.offload", "run.root",
    ),
    "plan": ("*",),
    "data": (
        "task", "recipe", "model", "model.*", "data", "data.*", "eval.source", "eval.tokens",
        "eval.protocol", "train.max_seq_len", "train.packing", "launch", "launch.*", "run", "run.*",
    ),
}  # fmt: skip
"""Globs of the keys that each task uses, except for those in `UNUSED_KEYS`."""

_SAMPLING = ("top_k", "top_p", "min_p", "seed")

_TRAINING_ONLY = ("eval.every", "eval.samples", "parallel.consistency_check_every")

UNUSED_KEYS = {
    "finetune": ("export", "export.*", "generate", "generate.*", "plan", "plan.*", "data.show"),
    "quantize": (*_TRAINING_ONLY, "hub.base"),
    "eval": (*_TRAINING_ONLY, "quant.save", "data.show"),
    "export": (*_TRAINING_ONLY, "quant.save", "data.show", "hub.base"),
    "generate": ("quant.save",),
    "plan": ("export", "export.*", "generate", "generate.*", "data.show"),
    "data": (),
}
"""Globs of keys that each task does not use although `USED_KEYS` covers their group."""

_OF_CALIBRATION = ("data", "data.*", "eval.source")
"""Globs of the keys that decide the text of quant.calibration; eval.source is held out of it."""

SWITCHED_OFF: dict[str, Any] = {"track.backends": [], "eval.source": None, "eval.reference": "off"}
"""Values that switch off what a key controls. A task that does not use the key needs no warning."""

_OF_HUB = ("hub.private", "hub.base")
_OF_WANDB = ("track.project", "track.entity")
_OF_FILES = (
    "data.format", "data.file_type", "data.text_field", "data.max_bad_rows", "data.validation",
)  # fmt: skip
_OF_CALIBRATION_FILES = ("data.text_field", "data.max_bad_rows")


def unused_settings(config: RunConfig, given: Collection[str]) -> Iterator[str]:
    """Yield one message for every key that the command gives without effect.

    Args:
        config: The checked configuration of the run.
        given: Dotted keys that the command line sets.
    """
    task, reasons = config.task, dict(_ineffective(config))
    for key in given:
        if not _is_used(key, config):
            group, _, name = key.partition(".")
            if key in SWITCHED_OFF and getattr(getattr(config, group), name) == SWITCHED_OFF[key]:
                continue
            yield f"{key}: is not used by task={task}."
        elif key in reasons:
            yield f"{key}: is not used, because {reasons[key]}."


def used_settings(config: RunConfig, keys: Collection[str]) -> list[str]:
    """Return those of `keys` that have an effect in a run of `config`."""
    reasons = dict(_ineffective(config))
    return [key for key in keys if _is_used(key, config) and key not in reasons]


def _is_used(key: str, config: RunConfig) -> bool:
    used, unused = USED_KEYS[config.task], UNUSED_KEYS[config.task]
    if config.quant.calibrates and config.task in ("quantize", "generate"):
        used, unused = (*used, *_OF_CALIBRATION), (*unused, "data.show")
    return _matches(key, used) and not _matches(key, unused)


def _matches(key: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _ineffective(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, reason) for every key that another key makes ineffective."""
    train, evaluation = config.train, config.eval
    if train.max_steps is not None:
        fix = "" if config.data.streaming else "; add train.max_steps=null"
        yield "train.epochs", f"train.max_steps={train.max_steps} takes precedence{fix}"
    if evaluation.source is None:
        for name in ("every", "tokens", "protocol", "reference", "samples", "harness"):
            yield f"eval.{name}", "eval.source=null turns the evaluation off"
    if evaluation.source is None or evaluation.reference != "cached":
        yield "eval.cache_dir", "only eval.reference=cached keeps what it measures"
    if not config.quant.quantizes and evaluation.streams_reference:
        for key in ("eval.reference", "eval.cache_dir"):
            yield key, "with quant.nbits=null the model without its adapter is the reference"
    keys_without = (
        (config.hub.push is None, _OF_HUB, "hub.push=null pushes nothing"),
        ("wandb" not in config.track.backends, _OF_WANDB, "track.backends does not contain wandb"),
    )
    yield from ((key, why) for is_off, keys, why in keys_without if is_off for key in keys)
    yield from _ineffective_generation(config.generate)
    yield from _ineffective_quantization(config.quant)
    yield from _ineffective_data(config)
    yield from _ineffective_export(config.export)


def _ineffective_quantization(quant: QuantConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, reason) for every key of the group `quant` that another makes ineffective."""
    if quant.nbits is None:
        overrides = [s for s in quant.overrides.values() if isinstance(s, dict)]
        unused = {f.name for f in fields(quant)} - {"nbits", "skip", "overrides"}
        for name in (*sorted(unused), *(["overrides"] if overrides else [])):
            yield f"quant.{name}", "quant.nbits=null quantizes nothing"
        return
    if quant.calibration is None:
        yield "quant.calibration_tokens", "quant.calibration=null uses no text"
    elif not quant.calibrates:
        solver = quant.solver_for(quant.nbits)
        at = f"quant.solver={solver}" if solver == quant.solver else f"quant.nbits={quant.nbits}"
        for key in ("quant.calibration", "quant.calibration_tokens"):
            yield key, f"{at} does not look at activations"


def _ineffective_generation(generate: GenerateConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, reason) for every key of the group `generate` that another makes ineffective."""
    if generate.temperature == 0:
        for name in _SAMPLING:
            yield f"generate.{name}", "generate.temperature=0 takes the most likely token"


def _ineffective_export(export: ExportConfig) -> Iterator[tuple[str, str]]:
    if export.format != "gguf":
        for name in ("gguf_type", "llama_cpp"):
            yield f"export.{name}", f"export.format={export.format} is not gguf"


def _ineffective_data(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, reason) for every key of the group `data` that another key makes ineffective."""
    evaluation = config.eval
    if config.data.streaming:
        yield "data.cache_dir", "data.streaming=true keeps no tokens"
    else:
        yield "data.shuffle_buffer", "data.streaming=false shuffles all sequences"
    if evaluation.source not in (AUTO, config.data.source):
        yield "data.validation", "eval.source names another text than data.source"
    if config.data.format not in (AUTO, "text"):
        yield "data.text_field", f"the columns of data.format={config.data.format} have fixed names"
    if {*source_paths(config.data.source), evaluation.source} <= {*BUILT_IN_SOURCES, AUTO, None}:
        is_file = config.quant.calibration_source not in (*BUILT_IN_SOURCES, None)
        for key in set(_OF_FILES) - set(_OF_CALIBRATION_FILES if is_file else ()):
            yield key, f"{describe_source(config.data.source)} is built in"
