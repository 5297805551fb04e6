"""Turn errors of Hydra, OmegaConf and YAML into messages that name the key, value and fix."""

import os
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.compose.recipes import RECIPES_VARIABLE, find_recipes, recipe_file
from hqqtrain.compose.schema import ComposedConfig, known_keys
from hqqtrain.config.foreign_names import our_name
from hqqtrain.config.typed_group import type_in_words


def check_recipe(name: str) -> None:
    """Check that `recipe=` names a recipe or an existing file.

    Raises:
        UserError: it does not.
    """
    file = recipe_file(name)
    if file is None:
        if name not in find_recipes():
            raise unknown_recipe_error(name)
    elif not file.is_file():
        known = sorted(find_recipes())
        if os.path.exists(Path(name).expanduser()):
            raise UserError(
                f"recipe={name}: no such recipe; it must be a file whose name ends with .yaml or "
                f".yml, or one of {', '.join(known)}."
            )
        siblings = [path.name for path in file.parent.glob("*.y*ml")]
        hint = did_you_mean(file.name, siblings) or did_you_mean(file.stem, known)
        raise UserError(
            f"recipe={name}: no such recipe.{hint} Allowed are the path of a YAML file, or one of "
            f"{', '.join(known)}."
        )


def unknown_recipe_error(name: str) -> UserError:
    """Return the error for a `recipe=` that no recipe folder contains."""
    known = sorted(find_recipes())
    # A file in the working directory is not found by its name, only by its path.
    files = {path.stem: f"./{path.name}" for path in sorted(Path.cwd().glob("*.y*ml"))}
    hint = f" Did you mean 'recipe={files[name]}'?" if name in files else did_you_mean(name, known)
    return UserError(
        f"recipe={name}: no such recipe.{hint} Recipes: {', '.join(known)}. "
        f"To add your own, create ./recipes/{name}.yaml or set {RECIPES_VARIABLE} to its folder; "
        f"the path of any YAML file works as well, as in recipe=./{name}.yaml."
    )


def missing_config_error(error: MissingConfigException) -> UserError:
    """Return the error for a missing file of a config group, as in `model=x` or `defaults: [x]`."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if group == "recipe":
        return unknown_recipe_error(name)
    options = list(error.options or ())
    return UserError(
        f"{group}={name}: no such option.{did_you_mean(name, options)} Allowed are "
        f"{', '.join(options)}, or set the single keys of {group} that --help lists."
    )


def unreadable_override_error(error: OverrideParseException) -> UserError:
    """Return the error for an argument that Hydra cannot parse. It shows how to quote the value."""
    return UserError(
        f"{error.override}: must be key=value; text with special characters needs quotes, as in "
        f"{_quoted_example(error.override)}. {error.message.splitlines()[0]}."
    )


def several_values_error(argument: str) -> UserError:
    """Return the error for values of a sweep, such as `a=1,2`, in the command of a single run."""
    key, _, value = argument.lstrip("+~").partition("=")
    hint, advice = dict(known_keys()).get(key), ""
    if _is_list(key, hint):
        advice = f" A list needs brackets, as in '{key}=[{value}]'."
    elif _is_free_text(key, hint) and "'" not in value:
        advice = f" A text with commas needs quotes, as in {_quoted_example(argument)}."
    return UserError(f"{argument}: must be one value; a sweep needs -m before it.{advice}")


def _is_free_text(key: str, hint: Any) -> bool:
    """Whether `key` of type `hint` has text that is not one of several choices."""
    types = (hint, *(get_args(hint) if isinstance(hint, UnionType) else ()))
    is_text = str in types or (hint is Any and isinstance(_field(key).default, str))
    if "." not in key or not is_text:
        return False
    return not _field(key).metadata.get("choices")


def _is_list(key: str, hint: Any) -> bool:
    """Whether `key` of type `hint` is a list by default."""
    is_union = hint is Any and "." in key and _field(key).default is MISSING
    return is_union or get_origin(hint) is list


def _field(key: str) -> Field:
    """Return the dataclass field of a dotted key."""
    group, _, name = key.partition(".")
    return next(f for f in fields(get_type_hints(ComposedConfig)[group]) if f.name == name)


def _quoted_example(argument: str) -> str:
    """Return `argument` as it must be typed: quoted for the shell, its value quoted for Hydra.

    If the value is missing or has quotes or brackets of its own, an example takes its place.
    """
    key, _, value = argument.lstrip("+~").partition("=")
    is_quotable = bool(value) and not set(value) & set("'\"[]{}\\$`!")
    hint = dict(known_keys()).get(key)
    if _is_list(key, hint):
        items = f'"{value}"' if is_quotable else '"one (1)","another"'
        return f"'{key}=[{items}]'"
    if get_origin(hint) is dict:  # Hydra reads no key in quotes
        return f"'{key}={{*.q_proj:{{nbits:4}}}}', where the keys of a mapping have none"
    text = value if is_quotable else "my (1).txt"
    return f"\"{key}='{text}'\""


def check_type(key: str, value: Any, where: str = "") -> None:
    """Check that `value` has the type of `key`.

    Args:
        key: A dotted key of the schema.
        value: The value to check.
        where: A prefix of the message, such as the name of a file.

    Raises:
        UserError: `value` has another type.
    """
    try:
        OmegaConf.update(_typed_config(), key, value, merge=True)
    except OmegaConfBaseException as error:
        raise _wrong_value_error(key, value, where, error) from None


@cache
def _typed_config() -> DictConfig:
    """Return a configuration with the types of all keys. Its values are those of earlier checks.

    A copy for every check would take most of the time of composing a configuration.
    """
    return OmegaConf.structured(ComposedConfig)


def _wrong_value_error(
    key: str, value: Any, where: str, error: OmegaConfBaseException
) -> UserError:
    """Return the error for `key`, or for the key inside `value` that OmegaConf complains about."""
    full_key = error.full_key or key
    config = OmegaConf.create({})
    OmegaConf.update(config, key, value)
    wrong_value = OmegaConf.select(config, full_key, throw_on_missing=False)
    shown = "null" if wrong_value is None else str(wrong_value)
    if expected := _describe_expected(full_key):
        if expected.startswith("a list") and isinstance(wrong_value, str):
            expected += f", as in '{full_key}=[{shown}]'"
        return UserError(f"{where}{full_key}={shown}: must be {expected}.")
    return UserError(f"{where}{full_key}={shown}: {str(error).splitlines()[0]}.")


def expected_type(key: str) -> str:
    """Describe the type of a key that is not a group, such as `an integer or null`."""
    return type_in_words(dict(known_keys())[key])


def _describe_expected(key: str) -> str:
    """Describe what the value of a key or group must be; an empty string if `key` is neither."""
    if key in dict(known_keys()):
        return expected_type(key)
    if key not in get_type_hints(ComposedConfig):
        return ""
    ours = our_name(key)  # `optim=adamw` of other tools
    hint = f"; a single value is for {ours}" if ours else ""
    return f"a mapping of keys, such as those of {key} in --help{hint}"


def broken_yaml_error(error: YAMLError, file: Any) -> UserError:
    """Return the error for a recipe that is not YAML, with the file, line and column."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return UserError(f"{file}: not valid YAML: {error}")
    line, column = error.problem_mark.line + 1, error.problem_mark.column + 1
    return UserError(f"{file}:{line}:{column}: not valid YAML: {error.problem}.")
