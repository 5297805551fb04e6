"""The standard library as text: which modules it has, and which of them are held out."""

import sys

import pytest

from hqqtrain.data import stdlib
from hqqtrain.data.stdlib import is_held_out, stdlib_modules, stdlib_texts


def test_the_split_rule_is_the_one_the_bundled_model_was_trained_under():
    """A module is held out by the sha256 of its name.

    Another rule would leak held-out text into the training of the bundled model.
    """
    some = ["argparse", "ast", "functools", "heapq", "json.decoder", "os", "pathlib", "typing"]
    assert [name for name in some if is_held_out(name)] == ["ast", "functools", "pathlib", "typing"]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder in place of the standard library."""
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_modules_are_sorted_by_dotted_name_without_tests_and_data():
    names = [name for name, _ in stdlib_modules()]
    assert names == sorted(set(names))
    assert {"json", "json.decoder", "argparse"} <= set(names)
    assert len(names) > 200
    parts = {part for name in names for part in name.split(".")}
    assert parts.isdisjoint({"test", "tests", "encodings", "__pycache__", "__init__"})
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_files_that_belong_to_no_module_are_excluded(library):
    for name in ("json/__init__.py", "json/decoder.py", "json/tests/a.py", "mine.py", "os.txt",
                 "_sysconfigdata__linux_.py", "site-packages/torch/a.py"):  # fmt: skip
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    assert [name for name, _ in stdlib_modules()] == ["json", "json.decoder"]


def test_the_two_splits_are_all_texts_and_share_none(library):
    for name in ("ast", "functools", "argparse", "os"):
        (library / f"{name}.py").write_text(f"# {name}\n")
    train, held_out = dict(stdlib_texts("train")), dict(stdlib_texts("held_out"))
    assert held_out == {"ast": "# ast\n", "functools": "# functools\n"}
    assert train == {"argparse": "# argparse\n", "os": "# os\n"}


def test_blank_and_undecodable_files_do_not_stop_the_reading(library):
    (library / "argparse.py").write_bytes(b"name = '\xff'\n")
    (library / "os.py").write_text(" \n")
    (library / "heapq.py").write_bytes(b"")
    assert dict(stdlib_texts("train")) == {"argparse": "name = '\ufffd'\n"}


def test_about_one_name_in_ten_is_held_out():
    share = sum(is_held_out(f"module{i}") for i in range(2000)) / 2000
    assert 0.08 < share < 0.12
