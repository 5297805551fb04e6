"""The origin of a run: its configuration, its input files, and the software versions.

A run directory records them, so that a later command can check whether it continues the same run.
"""

import json
import os
import platform
import subprocess
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from hqqtrain.common.digest import content_digest
from hqqtrain.common.errors import UserError
from hqqtrain.common.files import stat_digest
from hqqtrain.common.inputs import (
    adapter_files,
    is_pattern,
    matching_files,
    model_files,
    pattern_root,
    text_files,
)
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.config.data_sources import source_paths
from hqqtrain.config.groups import AUTO
from hqqtrain.config.renamed import with_new_names
from hqqtrain.config.run import (
    CHANGEABLE_ON_RESUME,
    NON_RESULT_GROUPS,
    RESULT_KEYS,
    RunConfig,
    with_added_keys,
)
from hqqtrain.rundir.yaml_file import damaged_error, read_yaml

MADE_FROM, SOURCE_KEY = "made_from.json", "model.name_or_path"
"""File next to a quantized model that records the digest of its source under this key."""

_PACKAGES = (
    "hqqtrain", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors",
    "bitsandbytes", "triton", "numpy",
)  # fmt: skip

_RESULT_GROUPS = RunConfig.__dataclass_fields__.keys() - set(NON_RESULT_GROUPS)


def check_same_config(folder: Path, config: RunConfig) -> None:
    """Check that config.yaml of `folder` has the same result-defining keys as `config`.

    Keys in `CHANGEABLE_ON_RESUME` may differ.

    Raises:
        UserError: the configuration is another, or the file is damaged. The message lists the keys
            that differ.
    """
    path = folder / "config.yaml"
    saved, current = with_new_names(read_yaml(path)), mask_secrets(asdict(config))
    if "identity" not in saved:  # config.yaml is cut off: the identity follows the configuration
        raise damaged_error(path, "it is incomplete")
    if saved.get("identity") == config.identity():
        return
    old = _flatten(with_added_keys(mask_secrets(saved)))
    new = _flatten(with_added_keys(current))
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if keys and all(k in CHANGEABLE_ON_RESUME for k in keys):
        return
    raise UserError(
        f"{folder}: contains a run of another configuration: "
        f"{_format_differences(keys, old, new) or 'of another version'}. "
        "Choose another run.name, or null, which gives each configuration a directory of its own."
    )


def result_settings(config: RunConfig) -> dict[str, Any]:
    """Return the keys that define the result and must not change on resume, as JSON values.

    A checkpoint contains them, so that it is recognized if it is copied into another run.
    """
    flat = _flatten(mask_secrets(asdict(config)))
    return {key: value for key, value in flat.items() if key not in CHANGEABLE_ON_RESUME}


def describe_other_settings(saved: Mapping[str, Any], config: RunConfig) -> str:
    """Return the differences between `saved`, from `result_settings`, and `config`; "" if none.

    A key that another release has added or removed is in one of the two only, and is not compared.
    """
    new = json.loads(json.dumps(result_settings(config)))
    keys = [key for key in sorted(saved.keys() & new.keys()) if saved[key] != new[key]]
    return _format_differences(keys, saved, new)


def _format_differences(keys: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return "; ".join(f"{k}={_shown(new, k)} (saved: {_shown(old, k)})" for k in keys)


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Return `group.key` -> value of all keys that define the result."""
    flat: dict[str, Any] = {}
    for group, value in values.items():
        if group in _RESULT_GROUPS:
            if isinstance(value, dict):
                flat |= {f"{group}.{key}": v for key, v in value.items()}
            else:  # `task`, which is in no group
                flat[group] = value
        elif group in RESULT_KEYS:
            flat |= {f"{group}.{key}": value[key] for key in RESULT_KEYS[group] if key in value}
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    """Return the value of `key` as a message shows it."""
    if key not in flat:
        return "absent"
    return "null" if flat[key] is None else textwrap.shorten(str(flat[key]), 200)


def package_versions() -> dict[str, str]:
    """Return name -> version of Python and of every installed package that affects results."""
    versions = {"python": platform.python_version()}
    found = {name: _installed_version(name) for name in _PACKAGES}
    return versions | {name: version for name, version in found.items() if version}


@cache
def _installed_version(name: str) -> str | None:
    """Return the version of a package, or None; reading its metadata takes 1 ms."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Return the git commit of this checkout, with `-dirty` if edited; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run([*command, "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def input_digests(config: RunConfig) -> dict[str, str]:
    """Return config key -> digest of the contents of the local file or folder that the key names.

    The identity of a run contains only the paths. The digests show whether the files have changed.
    """
    return {key: _input_digest(key, path) for key, path in _input_paths(config).items()}


def data_digests(config: RunConfig) -> dict[str, str]:
    """Return `input_digests` of those inputs that are data."""
    paths = _input_paths(config)
    return {key: _input_digest(key, paths[key]) for key in paths if _key(key) in _DATA_KEYS}


def changed_inputs(
    saved: Mapping[str, Any], config: RunConfig, keys: Collection[str] | None = None
) -> list[str]:
    """Return the config keys whose files are others than those in `saved`.

    Args:
        saved: The result of `input_digests` that config.yaml contains. The first release has
            recorded `stat_digest`, which is compared with its kind.
        config: The configuration of today's command.
        keys: The config keys to compare; None: all. The others are not read.
    """
    paths = _input_paths(config)
    if keys is not None:
        paths = {key: path for key, path in paths.items() if _key(key) in keys}
        saved = {key: digest for key, digest in saved.items() if _key(key) in keys}
    changed = sorted(saved.keys() - paths.keys())
    for key, path in paths.items():
        is_by_content = str(saved.get(key)).startswith("sha256:")
        digest = _input_digest(key, path) if is_by_content else stat_digest(path)
        if digest != saved.get(key):
            changed.append(key)
    return changed


def is_made_from(folder: Path, config: RunConfig, digest: str) -> bool:
    """Whether the quantized model in `folder` was made from the source with this digest.

    The first release has recorded `stat_digest` of a local folder, and null for a model of the hub
    or of this package.
    """
    made_from = read_yaml(folder / MADE_FROM)
    if SOURCE_KEY not in made_from:
        return False
    recorded, path = made_from[SOURCE_KEY], _input_paths(config).get(SOURCE_KEY)
    if str(recorded).startswith("sha256:"):
        return bool(recorded == digest)
    return bool(recorded == (stat_digest(path) if path else None))


_DATA_KEYS = ("data.source", "eval.source")


def _key(name: str) -> str:
    """Return the config key of an input, which is one of several: `data.source[1]`."""
    return name.partition("[")[0]


def _source_paths(source: Any) -> dict[str, str]:
    """Return name -> path of the sources of `data.source`."""
    if not isinstance(source, list):
        return {"data.source": str(source)}
    return {f"data.source[{i}]": path for i, path in enumerate(source_paths(source))}


def _input_paths(config: RunConfig) -> dict[str, Path]:
    """Return config key -> local path of the inputs that are files or folders of this machine.

    Others, such as pipes and the home of a user that does not exist, are left to their readers.
    """
    values = {
        SOURCE_KEY: config.model.name_or_path,
        "adapter.init_from": config.adapter.init_from,
        **_source_paths(config.data.source),
        "eval.source": None if config.eval.source == AUTO else config.eval.source,
        "quant.calibration": config.quant.calibration_source,
    }
    if config.task == "data":  # it reads no weights, and a digest of them would
        values = {key: path for key, path in values.items() if _key(key) in _DATA_KEYS}
    paths = {key: Path(os.path.expanduser(value)) for key, value in values.items() if value}
    return {
        key: path
        for key, path in paths.items()
        if os.path.isfile(path)
        or os.path.isdir(path)
        or (is_pattern(path) and matching_files(path))
    }


def _input_digest(key: str, path: Path) -> str:
    if not path.exists():
        root = pattern_root(path)
        return content_digest(root, [str(p.relative_to(root)) for p in matching_files(path)])
    if not path.is_dir():
        return content_digest(path.parent, [path.name])
    files = {SOURCE_KEY: model_files, "adapter.init_from": adapter_files}.get(key, text_files)
    return content_digest(path, files(path))
