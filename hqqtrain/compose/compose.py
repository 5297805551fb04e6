"""Compose `recipe=x key=value ...` into a RunConfig, or explain what is wrong with it."""

from functools import cache
from typing import Any, get_origin

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hqqtrain.common.errors import ErrorCollector, UserError
from hqqtrain.compose import run_settings, schema
from hqqtrain.compose.generation_model import select_run, use_model
from hqqtrain.compose.messages import (
    check_recipe,
    check_type,
    missing_config_error,
    several_values_error,
    unreadable_override_error,
)
from hqqtrain.compose.recipes import recipe_name
from hqqtrain.compose.source import RECIPE_GROUP, RecipeSearchPath, RecipeSource
from hqqtrain.config.run import RunConfig


def compose_config(overrides: list[str]) -> RunConfig:
    """Compose and check the configuration that a command line describes.

    Args:
        overrides: The `key=value` arguments of the command line.

    Raises:
        UserError: for every invalid argument or recipe; the message names the key or file.
    """
    return compose_unchecked(overrides).checked()


def compose_unchecked(overrides: list[str]) -> schema.ComposedConfig:
    """Compose a configuration with the recipe's `sweep`, and do not check it.

    Raises:
        UserError: an argument or recipe cannot be read, names an unknown key or has a wrong type.
    """
    parsed = parse_overrides(overrides)
    _register_plugins()
    _check_overrides(parsed)
    composed, given = _compose(parsed), {override.key_or_group for override in parsed}
    generates, run = composed.task == "generate", None
    if generates:
        run = select_run(composed, given)
    elif composed.task in run_settings.TASKS:
        run = run_settings.run_of(composed)
    if run:
        composed = _compose(parsed, run_settings.read_run_settings(run, given))
    if generates:
        use_model(composed, run, given)
    return composed


def _compose(parsed: list[Override], base: dict[str, Any] | None = None) -> schema.ComposedConfig:
    """Compose the defaults, the settings `base` of an earlier run, the recipe and `parsed`."""
    arguments = _hydra_arguments(parsed)
    if base is not None:
        ConfigStore.instance().store(
            group="base", name="run", node=base, package="_global_", provider="hqqtrain"
        )
        arguments.append("base=run")
    try:
        with initialize_config_module("hqqtrain.conf", version_base="1.3"):
            composed = OmegaConf.to_object(hydra_compose("config", arguments))
    except MissingConfigException as error:
        raise missing_config_error(error) from None
    except (HydraException, OmegaConfBaseException) as error:
        # An error without a message of its own. Show Hydra's text and the cause on one line.
        cause = f" {error.__cause__}" if error.__cause__ else ""
        raise UserError(" ".join(f"{error}{cause}".split())) from None
    assert isinstance(composed, schema.ComposedConfig)
    # Hydra knows the recipe as a config group, not as a value: fill in its name.
    names = (recipe_name(str(o.value())) for o in parsed if o.key_or_group == RECIPE_GROUP)
    composed.recipe = next(names, None)
    return composed


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Parse `key=value` arguments with Hydra's grammar. The last value of a repeated key wins.

    Raises:
        UserError: arguments do not follow the grammar; a line for each.
    """
    parser, parsed, errors = OverridesParser.create(), [], ErrorCollector()
    for override in overrides:
        with errors.collect():
            try:
                parsed += parser.parse_overrides([override])
            except OverrideParseException as error:
                raise unreadable_override_error(error) from None
    errors.raise_if_any()
    by_key = {override.key_or_group: override for override in parsed}
    if RECIPE_GROUP in by_key and by_key[RECIPE_GROUP].value() is None:
        del by_key[RECIPE_GROUP]  # recipe=null means no recipe, but Hydra would look for one
    return list(by_key.values())


@cache
def _register_plugins() -> None:
    schema.register_schema()
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)


def _check_overrides(overrides: list[Override]) -> None:
    """Check every override.

    Raises:
        UserError: with one line for every override that is refused, and for every value of the
            others, and of the recipe, that is not allowed.
    """
    errors, accepted = ErrorCollector(), []
    for override in overrides:
        with errors.collect():
            _check_override(override)
            accepted.append(override)
    if errors.lines:
        # Combinations are not checked: the refused overrides may be what they lack.
        with errors.collect():
            errors.lines += _compose(accepted).key_errors()
        errors.lines += schema.list_known_keys(override.key_or_group for override in overrides)
    errors.raise_if_any()


def _check_override(override: Override) -> None:
    """Refuse what Hydra would accept, or would refuse with a message that is hard to read.

    Raises:
        UserError: the override has an unknown key, a wrong type, or is not allowed here.
    """
    if override.is_sweep_override():
        raise several_values_error(str(override.input_line))
    key, value = override.key_or_group, override.value()
    if not key:
        raise UserError(f"{override.input_line}: has no key before the `=`.")
    if message := schema.describe_unknown_key(key):
        raise UserError(message)
    if override.is_delete():
        raise UserError(
            f"{override.input_line}: keys cannot be removed; set a value instead, as in {key}=..."
        )
    if key.split(".")[0] == "sweep":
        raise UserError(f"{override.input_line}: only allowed in recipes; use -m key=value,value.")
    if key == RECIPE_GROUP:
        check_recipe(str(value))
    elif not (
        key in schema.OPTION_GROUPS and isinstance(value, str)
    ):  # model=llama8b names an option
        check_type(key, value)


def _hydra_arguments(overrides: list[Override]) -> list[str]:
    """Return the arguments for Hydra, with the prefix `++` where a key is inside a dict.

    Hydra composes in struct mode, which refuses new keys even in a dict that allows any key.
    """
    dict_keys = tuple(key for key, hint in schema.known_keys() if get_origin(hint) is dict)
    arguments = []
    for override in overrides:
        argument = str(override.input_line).lstrip("+")
        is_in_dict = override.key_or_group.startswith(dict_keys)
        arguments.append(f"++{argument}" if is_in_dict else argument)
    return arguments
