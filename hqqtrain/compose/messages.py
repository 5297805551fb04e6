"""Turns what Hydra, OmegaConf and YAML say into messages that name key, value and remedy."""

from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.compose.recipes import VARIABLE, recipe_files
from hqqtrain.compose.schema import ComposedConfig, known_keys

_WORDS = {
    int: "an integer", float: "a number", bool: "true or false", str: "a text",
    list: "a list", dict: "a mapping", NoneType: "null",
}  # fmt: skip


def unknown_recipe(name: str) -> UserError:
    """For a `recipe=` that no folder has."""
    known = sorted(recipe_files())
    return UserError(
        f"recipe={name}: no such recipe.{did_you_mean(name, known)} Recipes: {', '.join(known)}. "
        f"Your own go into ./recipes/{name}.yaml or a folder named in {VARIABLE}."
    )


def missing_config(error: MissingConfigException) -> UserError:
    """For an option group's choice, or a recipe another one builds on, that does not exist."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if group == "recipe":
        return unknown_recipe(name)
    options = list(error.options or ())
    return UserError(
        f"{group}={name}: no such option.{did_you_mean(name, options)} Allowed are "
        f"{', '.join(options)}, or set the keys of {group} one by one, as in --help."
    )


def unreadable_override(error: OverrideParseException) -> UserError:
    """For a word that Hydra's grammar does not take: how it would have to be typed."""
    return UserError(
        f"{error.override}: must be key=value; text with special characters needs quotes, as in "
        f"{_typed(error.override)}. {error.message.splitlines()[0]}."
    )


def _typed(word: str) -> str:
    """`word` with its value in quotes, for a shell; an example where that has quotes already."""
    key, equals, value = word.lstrip("+~").partition("=")
    plain = bool(equals and value) and not set(value) & set("'\"[]{}\\$`!")
    if get_origin(dict(known_keys()).get(key)) is list:
        items = f'"{value}"' if plain else '"one (1)","another"'
        return f"'{key}=[{items}]'"
    return f"\"{key}='{value if plain else 'my (1).txt'}'\""


def check_type(key: str, value: Any, where: str = "") -> None:
    """Raises UserError if `key` cannot hold `value`; `where` is said before the key."""
    try:
        OmegaConf.update(OmegaConf.structured(ComposedConfig), key, value, merge=True)
    except OmegaConfBaseException as error:
        raise _wrong_value(key, value, where, error) from None


def _wrong_value(key: str, value: Any, where: str, error: OmegaConfBaseException) -> UserError:
    given = OmegaConf.create({})
    OmegaConf.update(given, key, value)
    full_key = error.full_key or key
    shown = _show(OmegaConf.select(given, full_key, throw_on_missing=False))
    if expected := _expected(full_key):
        return UserError(f"{where}{full_key}={shown}: must be {expected}.")
    return UserError(f"{where}{full_key}={shown}: {str(error).splitlines()[0]}.")


def expected_type(key: str) -> str:
    """In words, what a key that is no group holds: `an integer or null`."""
    hint = dict(known_keys(ComposedConfig))[key]
    members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return " or ".join(_WORDS.get(get_origin(m) or m, str(m)) for m in members)


def _expected(key: str) -> str:
    if key in dict(known_keys(ComposedConfig)):
        return expected_type(key)
    is_group = key in get_type_hints(ComposedConfig)
    return f"a mapping of keys, such as those of {key} in --help" if is_group else ""


def broken_yaml(error: YAMLError, file: Any) -> UserError:
    """For a recipe that is no YAML: the file, the line and what the parser stumbled over."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return UserError(f"{file}: not valid YAML: {error}")
    line, column = error.problem_mark.line + 1, error.problem_mark.column + 1
    return UserError(f"{file}:{line}:{column}: not valid YAML: {error.problem}.")


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
