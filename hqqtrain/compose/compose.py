"""Composes `recipe=x key=value ...` into a RunConfig and refuses, with reasons, what it cannot."""

from dataclasses import fields
from functools import cache

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hqqtrain.common.errors import UserError
from hqqtrain.compose import schema
from hqqtrain.compose.messages import (
    check_type,
    missing_config,
    unknown_recipe,
    unreadable_override,
)
from hqqtrain.compose.recipes import recipe_files
from hqqtrain.compose.source import GROUP, RecipeSearchPath, RecipeSource
from hqqtrain.config.run import RunConfig

_OPTION_GROUPS = (GROUP, "model", "launch")


def compose_config(overrides: list[str]) -> RunConfig:
    """The checked configuration that the words `key=value` of a command line stand for.

    Raises UserError, naming key or file, for everything that is wrong with them.
    """
    composed = compose_unchecked(overrides)
    config = RunConfig(**{item.name: getattr(composed, item.name) for item in fields(RunConfig)})
    config.check()
    return config


def compose_unchecked(overrides: list[str]) -> schema.ComposedConfig:
    """As `compose_config`, not yet checked against limits, and with the recipe's sweep."""
    parsed = parse_overrides(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: several values; a sweep needs -m before it.")
        _check(override)
    _register()
    try:
        with initialize_config_module("hqqtrain.conf", version_base="1.3"):
            composed = OmegaConf.to_object(hydra_compose("config", _spelled(parsed)))
    except MissingConfigException as error:
        raise missing_config(error) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error)) from None
    assert isinstance(composed, schema.ComposedConfig)
    composed.recipe = next((str(o.value()) for o in parsed if o.key_or_group == GROUP), None)
    return composed


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Hydra's reading of `key=value`; of a key given twice, the last counts."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise unreadable_override(error) from None
    last = {override.key_or_group: override for override in parsed}
    return [o for o in last.values() if not (o.key_or_group == GROUP and o.value() is None)]


@cache
def _register() -> None:
    schema.register_schema()
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)


def _check(override: Override) -> None:
    key, value = override.key_or_group, override.value()
    if fault := schema.unknown_key_error(key):
        raise UserError(fault)
    if override.is_delete():
        raise UserError(f"{override.input_line}: keys cannot be removed; set it, as in {key}=...")
    if key.split(".")[0] == "sweep":
        raise UserError(f"{override.input_line}: for recipes; here use -m key=value,value.")
    if key == GROUP:
        if str(value) not in recipe_files():
            raise unknown_recipe(str(value))
    elif not (key in _OPTION_GROUPS and isinstance(value, str)):
        check_type(key, value)


def _spelled(overrides: list[Override]) -> list[str]:
    """Values of dict-valued keys need Hydra's `++`: its struct mode closes dicts of any keys."""
    dicts = {key for key, hint in schema.known_keys() if getattr(hint, "__origin__", None) is dict}
    lines = []
    for override in overrides:
        line = str(override.input_line).lstrip("+")
        opened = any(override.key_or_group.startswith(key) for key in dicts)
        lines.append(f"++{line}" if opened else line)
    return lines


def _sentence(error: Exception) -> str:
    """The text of an error nobody foresaw, with its cause: still a message, not a traceback."""
    cause = f" {error.__cause__}" if error.__cause__ else ""
    return " ".join(f"{error}{cause}".split())
