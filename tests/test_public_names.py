"""`import hqqtrain` gives its names lazily, and all of them exist."""

import subprocess
import sys
from pathlib import Path

import pytest

import hqqtrain

NAMES = [name for name in hqqtrain.__all__ if not name.startswith("_")]


def test_the_import_needs_no_torch():
    program = "import sys, hqqtrain; print({'torch', 'transformers', 'peft'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_documented_and_no_module(name: str):
    package = Path(hqqtrain.__file__).parent
    assert not (package / name).exists()
    assert not (package / f"{name}.py").exists()
    value = getattr(hqqtrain, name)
    assert callable(value)
    assert value.__doc__


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError, match="no attribute 'quantise_model'"):
        _ = hqqtrain.quantise_model
