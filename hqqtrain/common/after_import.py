"""Call a function once another library has been imported, without importing it.

`import hqqtrain` extends transformers and PEFT, whose imports take seconds. A command that needs
neither must not wait for them.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(module: str, call: Callable[[], object]) -> None:
    """Call `call` as soon as `module` has been imported: now, if it has been already."""
    if module in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _AfterImport(module, call))


class _AfterImport(MetaPathFinder):
    """A finder that finds `module` by the other finders, and lets its loader call `call`."""

    def __init__(self, module: str, call: Callable[[], object]) -> None:
        self._module, self._call = module, call
        self._asks_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module or self._asks_others:
            return None
        self._asks_others = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asks_others = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                self._call()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
