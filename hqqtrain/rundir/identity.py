"""The origin of a run: its configuration, its input files, and the software versions.

A run directory records them, so that a later command can tell whether it means the same run.
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

_DEFINING = RunConfig.__dataclass_fields__.keys() - set(NON_RESULT_GROUPS)


def check_same_config(folder: Path, config: RunConfig) -> None:
    """Check that config.yaml of `folder` has the same result-defining keys as `config`.

    Keys in `CHANGEABLE_ON_RESUME` may differ.

    Raises:
        UserError: the configuration is another, or the file is damaged. The message lists the keys
            that differ.
    """
    path = folder / "config.yaml"
    saved, current = with_new_names(read_yaml(path)), mask_secrets(asdict(config))
    if "identity" not in saved:  # it is written after the configuration
        raise _damaged(path, "it is incomplete")
    if saved.get("identity") == config.identity():
        return
    old, new = _flatten(ADDED_GROUPS | saved), _flatten(current)
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if keys and all(k in CHANGEABLE_ON_RESUME for k in keys):
        return
    shown = "; ".join(f"{k}={_text(new, k)} (saved: {_text(old, k)})" for k in keys)
    raise UserError(
        f"{folder}: contains a run of another configuration: {shown or 'of another version'}. "
        "Choose another run.name, or null, which gives each configuration a directory of its own."
    )


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Return `group.key` -> value of all keys that define the result."""
    flat: dict[str, Any] = {}
    for group, value in values.items():
        if group in _DEFINING:
            keys = value if isinstance(value, dict) else {"": value}
            flat |= {f"{group}.{k}".rstrip("."): v for k, v in keys.items()}
    return flat


def _text(flat: dict[str, Any], name: str) -> str:
    if name not in flat:
        return "absent"
    return "null" if flat[name] is None else str(flat[name])


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON object; return an empty one if the file does not exist.

    Raises:
        UserError: the file cannot be read or contains anything else.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    if not isinstance(found, dict):
        raise _damaged(path, "it contains no keys")
    return found


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: cannot be read ({why}). Choose another run.name, or restore the file as the run "
        "wrote it."
    )


def package_versions() -> dict[str, str]:
    """Return name -> version of Python and of every installed package that affects results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the git commit of this checkout, with `-dirty` if edited; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def input_digests(config: RunConfig) -> dict[str, str]:
    """Return config key -> `stat_digest` of the local files that the key names.

    A run's identity only contains their paths; these digests reveal that the files have changed.
    """
    keys = {
        "model.name_or_path": config.model.name_or_path,
        "adapter.init_from": config.adapter.init_from,
        "data.source": config.data.source,
        "eval.source": config.eval.source,
    }
    paths = {key: Path(value).expanduser() for key, value in keys.items() if value}
    return {key: stat_digest(path) for key, path in paths.items() if path.exists()}


def source_digest(config: RunConfig) -> dict[str, str | None]:
    """Return the digest of the local source model, to detect later that the source has changed.

    The digest is stored in `MADE_FROM` next to the quantized model. It is None for models of the
    hub, which their name and revision identify.
    """
    key = "model.name_or_path"
    return {key: input_digests(config).get(key)}
