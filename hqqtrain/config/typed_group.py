"""Build a config group from plain values, whose types are checked.

The command line has Hydra for this. The Python API and the integrations, which have no Hydra, use
this module.
"""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hqqtrain.common.errors import UserError

_TYPE_NAMES = {
    int: "an integer", float: "a number", bool: "true or false", str: "a string",
    list: "a list", dict: "a mapping", NoneType: "null", Any: "a list or a string",
}  # fmt: skip

Group = TypeVar("Group")


def type_in_words(hint: Any) -> str:
    """Describe the type of a key, such as `an integer or null`."""
    return " or ".join(
        "a list of strings" if m == list[str] else _TYPE_NAMES.get(get_origin(m) or m, str(m))
        for m in _members(hint)
    )


def build_group(group: type[Group], values: Mapping[str, Any], name: str) -> Group:
    """Return the dataclass of a group.

    Args:
        group: The dataclass.
        values: Values by the names of its fields. The others have their defaults. As on the command
            line, an integer may be a string.
        name: What messages call the group, such as `quant`.

    Raises:
        UserError: A value has another type. The message has a line for each.
    """
    hints, converted, errors = get_type_hints(group), {}, []
    for key, value in values.items():
        try:
            converted[key] = _converted(value, hints[key])
        except (TypeError, ValueError):
            shown = "null" if value is None else value
            errors.append(f"{name}.{key}={shown}: must be {type_in_words(hints[key])}.")
    if errors:
        raise UserError("\n".join(errors))
    return group(**converted)


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value has a type, and the items of a list have theirs."""
    if type(value) is not (get_origin(hint) or hint):
        return False
    items = [get_origin(each) or each for each in get_args(hint)]
    is_any = not isinstance(value, list) or not items or Any in items
    return is_any or all(type(item) in items for item in value)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _converted(value: Any, hint: Any) -> Any:
    """Return `value` as one of the types of `hint`.

    Raises:
        TypeError: It has none of them.
        ValueError: It is a string that is no number.
    """
    types = [get_origin(member) or member for member in _members(hint)]
    if Any in types or any(_has_type(value, member) for member in _members(hint)):
        return value
    if float in types and type(value) is int:
        return float(value)
    if isinstance(value, str) and (number := next((t for t in types if t in (int, float)), None)):
        return number(value)
    raise TypeError(hint)
