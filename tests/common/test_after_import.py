"""A function is called once another module has been imported, and not before."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hqqtrain.common.after_import import after_import


def test_it_is_called_after_the_module_has_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "imported_later.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    after_import("imported_later", lambda: seen.append(sys.modules["imported_later"].value))
    finders = len(sys.meta_path)
    assert find_spec("imported_later") is not None  # a look without an import
    assert seen == []
    import imported_later  # type: ignore[import-not-found]

    assert seen == [imported_later.value] == [1]
    assert len(sys.meta_path) == finders - 1
    after_import("imported_later", lambda: seen.append(2))
    assert seen == [1, 2]


def test_a_module_that_does_not_exist_is_still_an_import_error():
    after_import("does_not_exist_anywhere", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="does_not_exist_anywhere"):
        __import__("does_not_exist_anywhere")


def test_importing_hqqtrain_imports_neither_torch_nor_transformers():
    program = "import sys, hqqtrain; print({'torch', 'transformers', 'peft'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
