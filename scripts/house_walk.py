"""Run `python -m hqqtrain WORDS` and record which files of the tree it passes through.

    python scripts/house_walk.py TREE OUT WORDS...

OUT is a JSON object of two lists of files:

* called: Those that have a function called, in the order of the first call. What an import calls is
  left out, since it says nothing about the path of a run.
* chain: Those on the Python call stack when the forward pass of a training step first calls
  hqqtrain_kernels, outermost first: the chain from the command line to the kernels. Frames of torch
  and of other libraries in between are not counted.

It is a process of its own because the profile hook stays installed.
"""

import inspect
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock


def walk(tree: Path, words: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Run `python -m hqqtrain WORDS` in `folder`; return its lists `called` and `chain`.

    Raises:
        subprocess.CalledProcessError: The command failed; its output has been printed.
    """
    out = folder / "files.json"
    line = [sys.executable, str(Path(__file__).resolve()), str(tree), str(out), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join([str(tree), str(tree / "kernels")])
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    done.check_returncode()
    return json.loads(out.read_text())


def walk_finetune(tree: Path) -> dict[str, list[str]]:
    """Walk through a finetune of three steps on a model of two layers."""
    from compare_trees_cases import BASE, translate, usage_of, write_inputs

    with tempfile.TemporaryDirectory(prefix="house-walk-") as folder:
        write_inputs(Path(folder), tree)
        return walk(tree, translate(BASE, usage_of(tree)), Path(folder))


class WalkHook:
    """A profile hook that collects `called` and `chain` of the files below `tree`."""

    def __init__(self, tree: str) -> None:
        self._packages = (f"{tree}/hqqtrain/", f"{tree}/kernels/")
        # Older trees have the first of these packages.
        self._trainer = (f"{tree}/hqqtrain/train/", f"{tree}/hqqtrain/training/")
        self.called: dict[str, None] = {}
        self.chain: dict[str, None] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Record a call of a function; see `sys.setprofile`."""
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(self._packages) or not _is_function(frame):
            return
        if name not in self.called and not _is_imported(frame):
            self.called[name] = None
        if not self.chain and name.startswith(self._packages[1]) and _has_gradients():
            stack = [name for name in _files_of_stack(frame) if name.startswith(self._packages)]
            if any(name.startswith(self._trainer) for name in stack):
                self.chain = dict.fromkeys(reversed(stack))


def main() -> None:
    """Run the command in this process under the hook; its exit code passes through."""
    tree, out, *words = sys.argv[1:]
    hook = WalkHook(tree)
    sys.argv = ["hqqtrain", *words]
    threading.setprofile(hook)
    sys.setprofile(hook)
    try:
        # A run ends with os._exit, after which nothing could be written.
        with mock.patch("os._exit", sys.exit):
            runpy.run_module("hqqtrain", run_name="__main__", alter_sys=True)
    finally:
        sys.setprofile(None)
        files = {"called": hook.called, "chain": hook.chain}
        lists = {what: [os.path.relpath(n, tree) for n in names] for what, names in files.items()}
        Path(out).write_text(json.dumps(lists))


def _has_gradients() -> bool:
    """Whether gradients are recorded, as in a training step, but in no evaluation."""
    torch = sys.modules.get("torch")
    return torch is None or torch.is_grad_enabled()


def _files_of_stack(frame: FrameType) -> Iterator[str]:
    """Yield the file of every function on the stack, innermost first."""
    caller: FrameType | None = frame
    while caller:
        if _is_function(caller):
            yield caller.f_code.co_filename
        caller = caller.f_back


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
