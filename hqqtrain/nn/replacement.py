"""Replace attributes of modules for a time, such as a `forward`.

A function that changes a model in place takes an `ExitStack`, and adds to it what takes the change
back, as the handle of a hook does. The change stays if there is none.
"""

from contextlib import ExitStack
from typing import Any


def replace_attribute(owner: Any, name: str, value: Any, undo: ExitStack | None) -> None:
    """Set an attribute of a module or another object, until `undo` is closed."""
    restore_attribute(owner, name, undo)
    setattr(owner, name, value)


def restore_attribute(owner: Any, name: str, undo: ExitStack | None) -> None:
    """Let `undo` give an attribute of an object the value that it has now, or none, if unset."""
    if undo is None:
        return
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(vars(owner).pop, name, None)
