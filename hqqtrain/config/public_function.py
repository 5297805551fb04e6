"""Check how a public function is called: the names of its arguments, and their classes."""

from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, TypeVar

from hqqtrain.common.errors import UserError
from hqqtrain.config.foreign_names import FOREIGN_NAMES

P = ParamSpec("P")
R = TypeVar("R")

_EXPECTED = {
    "model": "a module of PyTorch",
    "tokenizer": "a tokenizer of transformers",
    "data": "the result of load_data",
    "spec": "a QuantSpec of hqqtrain.quant.spec",
}
"""The kind of value that each argument takes, as messages name it."""


def public_function(
    **classes: type | tuple[type, ...],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function refuse unknown keywords and objects of another class, before it runs.

    Args:
        classes: The class of an argument, or several. None is allowed where it is the default.

    The function then raises:
        UserError: A keyword does not exist, and the message names the one that stands for it; or an
            argument has another class.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = signature(function).parameters

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            _check_keywords(function.__name__, kwargs, parameters)
            given = dict(zip(parameters, args, strict=False)) | kwargs
            for name, allowed in classes.items():
                if name in given and given[name] is not parameters[name].default:
                    _check_class(function.__name__, name, given[name], allowed)
            return function(*args, **kwargs)

        return checked

    return decorate


def _check_keywords(
    function: str, keywords: Iterable[str], parameters: Mapping[str, Parameter]
) -> None:
    """Check that a function has these keywords."""
    kinds = {parameter.kind for parameter in parameters.values()}
    if Parameter.VAR_KEYWORD in kinds or not (unknown := [*keywords - parameters.keys()]):
        return
    given = min(unknown)
    raise UserError(
        f"{function}: {given} is no argument.{did_you_mean(given, parameters)} Arguments are "
        f"{', '.join(parameters)}."
    )


def did_you_mean(given: str, names: Collection[str]) -> str:
    """Return a question for the name that an unknown one stands for; empty if there is none."""
    own = FOREIGN_NAMES.get(given, "").split("=")[0].rpartition(".")[2]
    nearest = [own] if own in names else get_close_matches(given, names, 1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def _check_class(
    function: str, argument: str, value: Any, allowed: type | tuple[type, ...]
) -> None:
    """Check the class of the value of an argument."""
    if isinstance(value, allowed):
        return
    raise UserError(
        f"{function}: {argument} is a {type(value).__name__}; it must be {_EXPECTED[argument]}."
    )
