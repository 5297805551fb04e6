"""Whether a run directory is this configuration's, and in what they differ where it is not."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.config.renamed import with_new_names
from hqqtrain.config.run import MAY_CHANGE, NOT_THE_RESULT, RunConfig

_DEFINING = RunConfig.__dataclass_fields__.keys() - set(NOT_THE_RESULT)


def check_same_config(folder: Path, config: RunConfig) -> None:
    """Raises UserError, with the difference, where config.yaml of `folder` is another run's."""
    path = folder / "config.yaml"
    there, here = with_new_names(read_yaml(path)), mask_secrets(asdict(config))
    if "identity" not in there:  # it stands behind the configuration
        raise _damaged(path, "it is incomplete")
    if there.get("identity") == config.identity():
        return
    old, new = _flat(there), _flat(here)
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if keys and all(k in MAY_CHANGE for k in keys):
        return
    shown = "; ".join(f"{k}={_text(new, k)} (there {_text(old, k)})" for k in keys)
    raise UserError(
        f"{folder}: holds a run of another configuration: {shown or 'of another version'}. Choose "
        "another run.name, or null, which gives each configuration a directory of its own."
    )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """`group.key` -> value of all that defines the result."""
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
    """A YAML or JSON object; empty where there is no file. Raises UserError for anything else."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no keys")
    return found


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path}: cannot be read ({why}). Choose another run.name, or bring the file back as the "
        "run wrote it."
    )
