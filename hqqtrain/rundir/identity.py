"""The origin of a run: its configuration, its input files, and the software versions.

A run directory records them, so that a later command can check whether it continues the same run.
"""

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import stat_digest
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.config.renamed import with_new_names
from hqqtrain.config.run import (
    ADDED_GROUPS,
    CHANGEABLE_ON_RESUME,
    NON_RESULT_GROUPS,
    RunConfig,
)

MADE_FROM = "made_from.json"
"""File next to a quantized model that records the digest of its source, see `source_digest`."""

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
        raise _damaged_error(path, "it is incomplete")
    if saved.get("identity") == config.identity():
        return
    old, new = _flatten(ADDED_GROUPS | saved), _flatten(current)
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if keys and all(k in CHANGEABLE_ON_RESUME for k in keys):
        return
    shown = "; ".join(f"{k}={_shown(new, k)} (saved: {_shown(old, k)})" for k in keys)
    raise UserError(
        f"{folder}: contains a run of another configuration: {shown or 'of another version'}. "
        "Choose another run.name, or null, which gives each configuration a directory of its own."
    )


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Return `group.key` -> value of all keys that define the result."""
    flat: dict[str, Any] = {}
    for group, value in values.items():
        if group in _RESULT_GROUPS:
            if isinstance(value, dict):
                flat |= {f"{group}.{key}": v for key, v in value.items()}
            else:  # `task`, which is in no group
                flat[group] = value
    return flat


def _shown(flat: dict[str, Any], key: str) -> str:
    """Return the value of `key` as a message shows it."""
    if key not in flat:
        return "absent"
    return "null" if flat[key] is None else str(flat[key])


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON object; return an empty one if the file does not exist.

    Raises:
        UserError: the file cannot be read or contains anything else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged_error(path, " ".join(str(error).split())) from error
    if not isinstance(content, dict):
        raise _damaged_error(path, "it contains no keys")
    return content


def _damaged_error(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: cannot be read ({reason}). Choose another run.name, or restore the file as the "
        "run wrote it."
    )


def package_versions() -> dict[str, str]:
    """Return name -> version of Python and of every installed package that affects results."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


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
    """Return config key -> `stat_digest` of the local file or folder that the key names.

    The identity of a run contains only the paths. The digests show whether the files have changed.
    """
    values = {
        "model.name_or_path": config.model.name_or_path,
        "adapter.init_from": config.adapter.init_from,
        "data.source": config.data.source,
        "eval.source": config.eval.source,
    }
    paths = {key: Path(value).expanduser() for key, value in values.items() if value}
    return {key: stat_digest(path) for key, path in paths.items() if path.exists()}


def source_digest(config: RunConfig) -> dict[str, str | None]:
    """Return config key -> digest of the local source model, to detect later that it has changed.

    The result is stored in `MADE_FROM` next to the quantized model. The digest is None for models
    of the hub, which their name and revision identify.
    """
    key = "model.name_or_path"
    return {key: input_digests(config).get(key)}
