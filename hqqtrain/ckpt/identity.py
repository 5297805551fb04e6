"""Compare a configuration with the one of an existing run directory."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from hqqtrain.config import RunConfig, UserError
from hqqtrain.config.run import MAY_CHANGE, NOT_THE_RESULT
from hqqtrain.config.secrets import masked

_DEFINING = RunConfig.__dataclass_fields__.keys() - set(NOT_THE_RESULT)


def refuse_another(folder: Path, config: RunConfig) -> None:
    """Check that config.yaml of `folder` has the same result-defining keys as `config`.

    Keys in `MAY_CHANGE` may differ.

    Raises:
        UserError: the configuration is another, or the file is damaged. The message lists the keys
            that differ.
    """
    path = folder / "config.yaml"
    saved, current = read_yaml(path), masked(asdict(config))
    if "identity" not in saved:  # it is written after the configuration
        raise _damaged(path, "it is incomplete")
    if saved.get("identity") == config.identity():
        return
    old, new = _flatten(saved), _flatten(current)
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if keys and all(k in MAY_CHANGE for k in keys):
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
