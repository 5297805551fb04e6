"""Check the arguments of a public function, and let messages name them as Python has them."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path, PurePath
from typing import Any, TypeVar

from hqqtrain.common.errors import UserError, describe_error
from hqqtrain.config.field import field_errors
from hqqtrain.config.run import RunConfig
from hqqtrain.config.typed_group import build_group

Group = TypeVar("Group")

_GROUPS = ("model", "quant", "adapter", "train", "data", "optim", "eval", "export", "hub")
_KEYS = {
    f"{group}.{item.name}": item.name
    for group in _GROUPS
    for item in fields(getattr(RunConfig(), group))
}
"""Config key -> the name of the argument that stands for it, unless a function has another one."""

_KEY = re.compile(rf"(?<![\w/.])(?:{'|'.join(_GROUPS)})\.\w+(?![\w/]|\.\w)")
_VALUES = {"null": "None", "true": "True", "false": "False"}
_VALUE = re.compile(rf"(?<=[= ])(?:{'|'.join(_VALUES)})(?=[ ,.;:)]|$)")


@contextmanager
def named_as_arguments(function: str, **names: str) -> Iterator[None]:
    """Let a `UserError` of the block name arguments of a function in place of config keys.

    Args:
        function: The name of the function, with which the message begins.
        names: The name of an argument -> the config key that it stands for, where they differ.

    Raises:
        UserError: The block has raised one.
    """
    renamed = _KEYS | {key: name for name, key in names.items()}
    try:
        yield
    except UserError as error:
        text = re.sub(r"\bHqqTrainConfig(?:\.(?=\w)|: )", "", str(error))
        text = _KEY.sub(lambda match: renamed.get(match[0], match[0]), text)
        text = _VALUE.sub(lambda match: _VALUES[match[0]], text)
        raise UserError(f"{function}: {text}") from error


def checked_group(group: type[Group], name: str, values: Mapping[str, Any]) -> Group:
    """Return a config group with some values, all of which are allowed.

    Args:
        group: The dataclass of the group.
        name: Its name.
        values: Values by the names of its keys. Tuples may stand for lists, and paths for texts.

    Raises:
        UserError: A value is not allowed. The message has a line for each.
    """
    config: Any = build_group(group, {k: _plain(v) for k, v in values.items()}, name)
    errors = [*field_errors(name, config)]
    if not errors and hasattr(config, "errors"):
        errors = [*config.errors()]
    if errors:
        raise UserError("\n".join(errors))
    return config


def folder_argument(folder: str | os.PathLike[str], name: str = "folder") -> Path:
    """Return the full path of a folder that a user names.

    Args:
        folder: The value of the argument.
        name: The name of the argument.

    Raises:
        UserError: It is no path.
    """
    try:
        path = Path(os.path.abspath(os.path.expanduser(folder)))
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (TypeError, ValueError, OSError) as error:
        reason = describe_error(error)[:100]
        raise UserError(f"{name}={str(folder)[:100]!r}: is not a path ({reason}).") from error
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, PurePath) else value
