"""The keys that a composed configuration may have: RunConfig's and, in recipes, `sweep`.

The dataclasses are the schema; this module does not repeat any key.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore

from hqqtrain.config.renamed import RENAMED_KEYS
from hqqtrain.config.run import RunConfig


@dataclass(kw_only=True, slots=True)
class ComposedConfig(RunConfig):
    """A RunConfig during composition, when a recipe may also have a `sweep`."""

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


def known_keys(schema: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every key that has a value of its own, not of groups."""
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            yield from known_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, hint


def unknown_key_error(dotted: str) -> str | None:
    """Return None if the key `dotted` exists, otherwise a message that suggests similar keys."""
    if dotted in RENAMED_KEYS:
        return f"{dotted}: is called {RENAMED_KEYS[dotted]} now; use that name."
    schema: Any = ComposedConfig
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        hints = get_type_hints(schema) if is_dataclass(schema) else {}
        if part not in hints:
            return _unknown(dotted, ".".join(parts[:depth]), list(hints))
        schema = hints[part]
        if get_origin(schema) is dict:
            return None
    return None


def _unknown(dotted: str, group: str, siblings: list[str]) -> str:
    if not siblings:
        return f"{dotted}: unknown key; {group} is a single value and has no keys."
    of = f"Keys of {group}" if group else "Groups and keys"
    allowed = [name for name in siblings if group or name not in ("recipe", "sweep")]
    return f"{dotted}: unknown key.{_nearest(dotted, group, siblings)} {of}: {', '.join(allowed)}."


def _nearest(dotted: str, group: str, siblings: list[str]) -> str:
    """Suggest a similar key of the group, a key of the same name elsewhere, or any similar key."""
    last = dotted.rpartition(".")[2]
    near = [f"{group}.{name}" for name in get_close_matches(last, siblings, n=1) if group]
    keys = [key for key, _ in known_keys()]
    namesakes = [key for key in keys if key.endswith(f".{last}")]
    found = (
        near
        or get_close_matches(dotted, namesakes, n=1, cutoff=0.0)
        or get_close_matches(dotted, keys, n=1)
    )
    return f" Did you mean '{found[0]}'?" if found else ""
