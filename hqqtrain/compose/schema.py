"""The schema of a composed configuration: the keys of `RunConfig`, and `sweep` in recipes.

The dataclasses declare the keys, so this module does not repeat any.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore

from hqqtrain.config.foreign_names import our_name, reason_to_leave_out
from hqqtrain.config.renamed import RENAMED_KEYS
from hqqtrain.config.run import RunConfig

OPTION_GROUPS = ("model", "launch")
"""Groups with named options: `model=llama8b` selects one, `model.revision=x` sets a key."""


@dataclass(kw_only=True, slots=True)
class ComposedConfig(RunConfig):
    """A `RunConfig` that is being composed. Its recipe may have a `sweep`: key -> values."""

    sweep: dict[str, str] = field(default_factory=dict)

    def checked(self) -> RunConfig:
        """Return the configuration of one run, without `sweep`.

        Raises:
            UserError: with one line for every error, see `RunConfig.check`.
        """
        config = RunConfig(**{item.name: getattr(self, item.name) for item in fields(RunConfig)})
        config.check()
        return config


def register_schema() -> None:
    """Register the schema with Hydra under the name that conf/config.yaml refers to."""
    ConfigStore.instance().store(name="run_schema", node=ComposedConfig, provider="hqqtrain")


def known_keys() -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every key, `sweep` included. A group is not a key."""
    for name, hint in get_type_hints(ComposedConfig).items():
        if is_dataclass(hint):
            yield from ((f"{name}.{key}", type_) for key, type_ in get_type_hints(hint).items())
        else:
            yield name, hint


def describe_unknown_key(key: str) -> str | None:
    """Return None if the dotted `key` exists, otherwise a message that suggests similar keys."""
    if key in RENAMED_KEYS:
        return f"{key}: is called {RENAMED_KEYS[key]} now; use that name."
    if (missing := _missing_part(key)) is None:
        return None
    group, allowed = missing
    if not allowed:
        return f"{key}: unknown key; {group} is a single value and has no keys."
    if reason := reason_to_leave_out(key):
        return f"{key}: unknown key. Leave it out: {reason}."
    suggestion = our_name(key) or _similar_key(key, group, allowed)
    return f"{key}: unknown key.{f' Did you mean {suggestion}?' if suggestion else ''}"


def list_known_keys(keys: Iterable[str]) -> list[str]:
    """Return a line for each group that lacks some of `keys`, with the keys that it has."""
    lines = []
    for key in keys:
        group, allowed = _missing_part(key) or ("", [])
        if allowed and key not in RENAMED_KEYS:
            title = f"Keys of {group}" if group else "Groups and keys"
            shown = [name for name in allowed if group or name not in ("recipe", "sweep")]
            lines.append(f"{title}: {', '.join(shown)}.")
    return list(dict.fromkeys(lines))


def _missing_part(key: str) -> tuple[str, list[str]] | None:
    """Return the part of a dotted key that exists, and the keys below it; None if all exists."""
    type_: Any = ComposedConfig
    names = key.split(".")
    for depth, name in enumerate(names):
        hints = get_type_hints(type_) if is_dataclass(type_) else {}
        if name not in hints:
            return ".".join(names[:depth]), list(hints)
        type_ = hints[name]
        if get_origin(type_) is dict:  # its keys are the user's own, such as names of layers
            return None
    return None


def _similar_key(key: str, group: str, allowed: list[str]) -> str | None:
    """Return, in quotes, the key that the user may have meant by `key`; None if none is similar."""
    name = key.rpartition(".")[2]
    if group and (in_group := get_close_matches(name, allowed, n=1)):
        return f"'{group}.{in_group[0]}'"
    keys = [known for known, _ in known_keys() if known != "sweep"]
    # A key of the same name in another group fits, however different the name of the group is.
    same_name = [known for known in keys if known.endswith(f".{name}")]
    if same_name:
        return f"'{get_close_matches(key, same_name, n=1, cutoff=0.0)[0]}'"
    similar = get_close_matches(key, keys, n=1)
    return f"'{similar[0]}'" if similar else None
