"""The figures of house_counts.py on a made-up tree of a few lines."""

import subprocess
import sys
from pathlib import Path

import house_counts
import pytest

SCRIPT = Path(house_counts.__file__)
LOOP = '''"""What a loop is."""

LIMIT = 3
"""Of steps."""


class Loop:
    """Steps."""

    def run(self, config: RunConfig, plan: "Plan", built: Built | None) -> None:
        if config.strategy in ("ddp", "fsdp2"):  # both replicate
            pass


def make_loop(config):
    match config.strategy:
        case "zero3":
            return None


def _private():
    pass  # fmt: skip
'''
PLACES = {
    "docstrings that begin with Of, What, Else or Whose": [
        "training/loop.py:1",
        "training/loop.py:4",
    ],
    "strategy names compared outside the strategies": [
        "training/loop.py:11",
        "training/loop.py:17",
    ],
    "functions with two or more parameters of the clump": ["training/loop.py:10 run"],
    "functions that take a RunConfig: back end below tasks": ["training/loop.py:10 run"],
    "functions that take a RunConfig: tasks": ["tasks/run.py:1 run"],
    "functions that take a RunConfig: front end, config and common": ["cli.py:1 main"],
    "modules without a test_<module>.py": ["cli.py", "tasks/run.py"],
    "files over 300 lines": [],
    "functions over 60 lines outside *_triton.py": [],
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "hqqtrain/__init__.py": "",
        "hqqtrain/cli.py": "def main(config: RunConfig): pass\n",
        "hqqtrain/tasks/run.py": "def run(config: config.RunConfig): pass\n",
        "hqqtrain/training/loop.py": LOOP,
        "hqqtrain/distributed/strategies/ddp.py": "if x == 'ddp':\n    pass\n",
        "kernels/hqqtrain_kernels/wide_triton.py": "def wide():\n" + "    x = 1\n" * 70,
        "tests/unit/test_loop.py": "",
        "tests/unit/test_ddp.py": "",
        "tests/unit/test_wide_triton.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_places(tree):
    modules = house_counts.read_tree(tree)
    tested = {"loop", "ddp", "wide_triton"}
    found = house_counts.find_places(modules, frozenset({"Plan", "Built"}), tested)
    assert found == {what: [f"hqqtrain/{at}" for at in places] for what, places in PLACES.items()}


def test_sizes_and_names(tree):
    modules = house_counts.read_tree(tree)
    rows = dict(map(tuple, house_counts.sizes(modules)[:6] + house_counts.names(modules)))
    assert rows["hqqtrain: files, lines"] == "5, 26"
    assert rows["  lines of functions: median, p90, max"] == "2, 4, 4"
    assert rows["  lines with a comment"] == "3.8 % (1 of 26)", "one for a tool does not count"
    assert rows["hqqtrain: public module-level functions of one word"] == "67 % (2 of 3)"
    assert rows["hqqtrain: public methods of one word"] == "100 % (1 of 1)"
    assert rows["kernels/hqqtrain_kernels: public classes of one word"] == "-"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Layout", True), ("HQQLinear", False), ("RunConfig", False), ("run", True), ("a_b", False)],
)
def test_one_word(name, expected):
    assert house_counts.is_one_word(name) is expected


def test_table(tree):
    command = [sys.executable, SCRIPT, "--tree", tree, "--clump", "Plan,Built", "--details"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "kernels/hqqtrain_kernels: files, lines" in output
    assert "\nmodules without a test_<module>.py:\n  hqqtrain/cli.py\n" in output


def test_a_module_may_be_tested_by_another_test(tree, monkeypatch):
    assert house_counts.tested_stems(tree) == {"loop", "ddp", "wide_triton"}
    monkeypatch.setattr(house_counts, "TESTED_BY", {"hqqtrain/cli": "test_loop"})
    assert "cli" in house_counts.tested_stems(tree)
    monkeypatch.setattr(house_counts, "TESTED_BY", {"hqqtrain/cli": "test_gone"})
    with pytest.raises(FileNotFoundError, match="hqqtrain/cli names test_gone"):
        house_counts.tested_stems(tree)


def test_the_tests_of_this_tree_that_test_other_modules_exist():
    root = SCRIPT.parents[1]
    for module, test in house_counts.TESTED_BY.items():
        assert (root / f"{module}.py").exists(), module
        assert list(root.glob(f"tests/**/{test}.py")), test
