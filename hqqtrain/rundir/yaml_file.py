"""Read config.yaml and the small JSON files of a run, in bounded time and memory.

YAML can describe far more than its size: a few references to anchors expand to billions of values.
No run writes such a file, but somebody may have put one in its place.
"""

import textwrap
from pathlib import Path
from typing import Any

import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import read_bounded

_MAX_BYTES = 1 << 20
"""Largest file that is read. PyYAML reads about 0.3 MB/s."""

_MAX_NUMBER_LENGTH = 400
"""Digits of an integer; those of the largest finite float are fewer."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON object; return an empty one if the file does not exist.

    Raises:
        UserError: the file cannot be read or contains anything else.
    """
    try:
        content = yaml.load(read_bounded(path, _MAX_BYTES), _BoundedLoader)  # noqa: S506 (a SafeLoader)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except RecursionError as error:
        raise damaged_error(path, "it is nested too deeply") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise damaged_error(path, reason) from error
    if not isinstance(content, dict):
        raise damaged_error(path, "it contains no keys")
    return content


class _BoundedLoader(yaml.SafeLoader):
    """Reads what `yaml.safe_dump` writes, but no file that expands beyond its size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse references: a few lines of them can stand for a structure of any size."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it contains a reference to an anchor, which no run writes")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> Any:
        """Refuse integers whose conversion would take longer than reading the file."""
        if len(node.value) > _MAX_NUMBER_LENGTH:
            raise yaml.YAMLError(f"it contains a number of {len(node.value)} digits")
        return super().construct_yaml_int(node)


_BoundedLoader.add_constructor("tag:yaml.org,2002:int", _BoundedLoader.construct_yaml_int)


def damaged_error(path: Path, reason: str) -> UserError:
    """Return the error for a file of a run that cannot be used."""
    return UserError(
        f"{path}: cannot be read ({reason}). Choose another run.name, or restore the file as the "
        "run wrote it."
    )
