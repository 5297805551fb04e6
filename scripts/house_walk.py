"""Runs `python -m hqqtrain WORDS` and writes down which files of the tree have functions called.

    python scripts/house_walk.py TREE OUT WORDS...

OUT gets a line per file, in the order of the first call. What an import calls is left out, since
it says nothing about the path of a run. A process of its own: the profile hook stays installed.
"""

import inspect
import os
import runpy
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any


def main() -> None:
    """Run the command in this process under the hook; its exit code passes through."""
    tree, out, *words = sys.argv[1:]
    called: dict[str, None] = {}
    packages = (f"{tree}/hqqtrain/", f"{tree}/kernels/")

    def watch(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or name in called or not name.startswith(packages):
            return
        if _is_function(frame) and not _is_imported(frame):
            called[name] = None

    sys.argv = ["hqqtrain", *words]
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        runpy.run_module("hqqtrain", run_name="__main__", alter_sys=True)
    finally:
        sys.setprofile(None)
        lines = [f"{os.path.relpath(name, tree)}\n" for name in called]
        Path(out).write_text("".join(lines))


def _is_function(frame: FrameType) -> bool:
    """Whether the code is a function, not the body of a module or a class."""
    return bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)


def _is_imported(frame: FrameType) -> bool:
    """Whether a module other than `__main__` is being executed further up the stack."""
    caller = frame.f_back
    while caller:
        if not _is_function(caller) and caller.f_globals.get("__name__") != "__main__":
            return True
        caller = caller.f_back
    return False


if __name__ == "__main__":
    main()
