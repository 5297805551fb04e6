"""The settings of an earlier run, from which `task=eval`, `export` and `generate` of it start.

A run is measured as it was trained: with its held-out text, its sequence length and its precision.
Its config.yaml is the base, and the recipe and the command line override it.
"""

import json
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.common.packed_folders import is_quantized
from hqqtrain.common.secrets import MASK
from hqqtrain.compose.messages import check_type
from hqqtrain.compose.schema import known_keys
from hqqtrain.config.groups import AUTO
from hqqtrain.config.renamed import with_new_names
from hqqtrain.config.run import RunConfig
from hqqtrain.config.unused import used_settings
from hqqtrain.rundir.identity import changed_inputs, read_yaml
from hqqtrain.rundir.layout import RunLayout

TASKS = ("eval", "export", "generate")
"""The tasks that start from the settings of the run that they work on."""

_GROUPS = ("quant", "adapter", "train", "data", "eval")

_OF_THE_MACHINE = (
    "quant.backend", "quant.cache_dir", "quant.offload_meta", "quant.save", "quant.storage_dtype",
    "adapter.init_from",
)  # fmt: skip
"""Keys of these groups that depend on the machine, or that only the first run needs."""

_PACKED = (
    "quant.nbits", "quant.group_size", "quant.axis", "quant.solver", "quant.meta_dtype",
    "quant.skip", "quant.overrides", "quant.overrides.*", "quant.zero", "quant.calibration",
    "quant.calibration_tokens",
)  # fmt: skip
"""Keys that say how a model is quantized; a model that is quantized already keeps its own."""


_OF_CALIBRATION = ("quant.calibration", "quant.solver", "quant.overrides", "quant.overrides.*")
"""Keys that say whether quantization needs text; a model that is quantized already needs none."""


def run_of(config: RunConfig) -> RunLayout | None:
    """Return the run that `model.name_or_path` names, by its folder or its quantized/, if any.

    A run with an adapter but without quantized/ has quantized nothing.
    """
    if config.model.source != "pretrained":
        return None
    named = Path(config.model.name_or_path).expanduser()
    # The name may be a link to either folder.
    for folder in (named, named.resolve()):
        for run in (RunLayout(folder), RunLayout(folder.parent)):
            is_named = folder in (run.folder, run.quantized)
            has_model = run.has_quantized or run.has_adapter
            if is_named and run.config_yaml.is_file() and has_model:
                return run
    return None


def read_run_settings(run: RunLayout, given: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return group -> key -> value of the settings that config.yaml of `run` contributes.

    Keys that this release does not have are left out.

    Args:
        run: The run directory.
        given: Dotted keys that the command line sets.

    Raises:
        UserError: config.yaml is damaged, or a value in it contains a secret, which it hides.
    """
    saved, keys = with_new_names(read_yaml(run.config_yaml)), dict(known_keys())
    settings: dict[str, dict[str, Any]] = {}
    for group in _GROUPS:
        values = saved.get(group)
        for name, value in values.items() if isinstance(values, dict) else ():
            key = f"{group}.{name}"
            if key not in keys or key in _OF_THE_MACHINE or key in given:
                continue
            if MASK in str(value):
                raise UserError(
                    f"{run.config_yaml}: {key}={value} contains a secret, which the file hides; "
                    f"give {key} on the command line."
                )
            check_type(key, value, f"{run.config_yaml}: ")
            settings.setdefault(group, {})[name] = value
    if run.has_quantized and not _matching(given, _OF_CALIBRATION):
        settings.setdefault("quant", {}).update(calibration=None, solver="auto", overrides={})
    return settings


def settings_of_recipe(run: RunLayout, config: RunConfig, given: Collection[str]) -> list[str]:
    """Return `key=value (run: value)` of each setting of `run` that the recipe replaces.

    Args:
        run: The run directory.
        config: The configuration of the task.
        given: Dotted keys that the command line sets.
    """
    if config.recipe is None:
        return []
    replaced = {
        f"{group}.{name}": (getattr(getattr(config, group), name), value)
        for group, values in read_run_settings(run, given).items()
        for name, value in values.items()
    }
    different = [key for key, (now, saved) in replaced.items() if now != saved]
    ignored = settings_of_packed_model(config, different)
    return [
        "{}={} (run: {})".format(key, *map(_shown, replaced[key]))
        for key in used_settings(config, different)
        if key not in ignored
    ]


def _shown(value: Any) -> str:
    """Return a value as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def held_out_warnings(run: RunLayout, config: RunConfig) -> Iterator[str]:
    """Yield why text that `config` holds out may be text that `run` was trained on.

    Args:
        run: The run whose model is evaluated.
        config: The configuration of the evaluation.
    """
    saved = read_yaml(run.config_yaml)
    groups = (saved.get(key) for key in ("inputs", "data", "eval"))
    inputs, data, evaluation = (g if isinstance(g, dict) else {} for g in groups)
    trained, measured = data.get("source"), evaluation.get("source")
    values = {"data.source": config.data.source, "eval.source": config.eval.source}
    changed = {name.partition("[")[0] for name in changed_inputs(inputs, config, values)}
    recorded = {str(name).partition("[")[0] for name in inputs}
    for key, source in (("data.source", trained), ("eval.source", measured)):
        if values[key] == source and key in changed and key in recorded:
            yield (
                f"{key}={source}: is not the text that {run.folder} has used: it has changed, or "
                "a relative path means another file here. The figures cannot be compared with "
                "those of the run, which may have trained on some of this text."
            )
    splits = config.eval.source in (AUTO, config.data.source)
    shares = data.get("validation"), config.data.validation
    if config.data.source != trained or not splits:
        return
    if measured not in (AUTO, trained):
        yield (
            f"eval.source={config.eval.source}: {run.folder} was trained on {trained} and held "
            "out no part of it by data.validation."
        )
    elif None not in shares and shares[0] != shares[1]:
        yield (
            f"data.validation={shares[1]}: {run.folder} held out {shares[0]} and was trained on "
            "the rest, of which some is measured now."
        )


def settings_of_packed_model(config: RunConfig, given: Collection[str]) -> list[str]:
    """Return the keys in `given` that a model which is quantized already does not use."""
    folder = Path(config.model.name_or_path).expanduser()
    run = run_of(config)
    if not is_quantized(folder) and (run is None or not run.has_quantized):
        return []
    return _matching(given, _PACKED)


def _matching(keys: Collection[str], patterns: Collection[str]) -> list[str]:
    """Return those of `keys` that match a glob."""
    return [key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns)]
