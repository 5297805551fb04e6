"""Rules for the source tree that no linter checks."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 300
"""Largest number of lines of a file."""
MAY_PRINT = (
    "hqqtrain/cli.py",
    "hqqtrain/launch/sweep/report.py",
    "hqqtrain/launch/sweep/runner.py",
    "hqqtrain/tracking/console.py",
)


def _files(pattern: str, *folders: str) -> list[Path]:
    files = (file for folder in folders for file in (ROOT / folder).rglob(pattern))
    return sorted(file for file in files if "__pycache__" not in file.parts)


MODULES = _files("*.py", "hqqtrain", "kernels", "scripts")
EVERY_MODULE = MODULES + _files("*.py", "tests")


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_modules_are_found():
    assert len(MODULES) > 40


@pytest.mark.parametrize("folder", ["kernels", "recipes", "tests", "scripts"])
def test_folders_that_would_shadow_other_packages_are_not_packages(folder):
    """`kernels/__init__.py` would hide Hugging Face's `kernels` from transformers."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_test_folder_is_a_package():
    assert _files("__init__.py", "tests") == []


def test_files_are_short():
    lengths = {_name(file): len(file.read_text("utf-8").splitlines()) for file in MODULES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_every_module_has_a_docstring():
    assert [_name(file) for file in EVERY_MODULE if not ast.get_docstring(_tree(file))] == []


def test_only_the_command_line_and_the_console_print():
    folders = (ROOT / "scripts", ROOT / "kernels" / "bench")
    silent = [f for f in MODULES if _name(f) not in MAY_PRINT and f.parent not in folders]
    nodes = ((file, node) for file in silent for node in ast.walk(_tree(file)))
    calls = [(file, node) for file, node in nodes if isinstance(node, ast.Call)]
    prints = [(_name(file), call.lineno) for file, call in calls if _is_print(call)]
    assert prints == []


def _is_print(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "print"


PRIVATE_OF_MODULES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
"""Attributes of `nn.Module`, which our modules would reach through `self`, too."""
ATTRIBUTE_FUNCTIONS = {"getattr", "setattr", "hasattr", "delattr"}
"""Functions that take the name of an attribute as their second argument."""
ALLOWED_NAMES = {"_exit", "_normalize_file_name"}
"""`os._exit` is public. Plugins inherit the second from Hydra's `ConfigSource`."""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name.strip("_").isidentifier()


@cache
def _own_private_names() -> set[str]:
    """Return the private functions, methods and attributes that our own code defines."""
    nodes = [node for file in PRODUCT for node in ast.walk(_tree(file))]
    methods = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    of_self = [node for node in attributes if ast.unparse(node.value) == "self"]
    assigned = {node.attr for node in of_self if isinstance(node.ctx, ast.Store)}
    fields = {ast.unparse(node.target) for node in nodes if isinstance(node, ast.AnnAssign)}
    return (methods | assigned | fields) - PRIVATE_OF_MODULES


def _foreign_private_names(tree: ast.Module, own: set[str]) -> list[str]:
    """Return "line: name" of private attributes, modules and imports that are not our own."""
    private_names: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and node.attr not in own | ALLOWED_NAMES:
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = ".".join([module, *(alias.name for alias in node.names)]).split(".")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ATTRIBUTE_FUNCTIONS:
            names = [str(getattr(node.args[1], "value", ""))]
        private_names += [(node.lineno, name) for name in names if _is_private(name)]
    return [f"{line}: {name}" for line, name in sorted(private_names)]


PRODUCT = _files("*.py", "hqqtrain", "kernels/hqqtrain_kernels")


def test_only_compat_uses_private_parts_of_other_libraries():
    files = [file for file in PRODUCT if file.name != "compat.py"]
    own = _own_private_names()
    names = {_name(file): _foreign_private_names(_tree(file), own) for file in files}
    found = {name: lines for name, lines in names.items() if lines}
    assert found == {}, "put these into compat.py, under public names and with tests"


@pytest.mark.parametrize("code", [
    "from torch.distributed.fsdp._common_utils import x", "import torch._C", "torch._C.f()",
    "from torch.distributed import _get", "self._buffers", "getattr(module, '_hf_hook')",
])  # fmt: skip
def test_private_parts_are_found(code):
    assert _foreign_private_names(ast.parse(code), _own_private_names())


def test_the_recipe_folder_has_only_recipes():
    assert {file.suffix for file in (ROOT / "recipes").iterdir()} == {".yaml"}


def test_the_launcher_is_short_and_executable():
    launcher = ROOT / "launch.sh"
    assert launcher.stat().st_mode & 0o111
    assert len(launcher.read_text(encoding="utf-8").splitlines()) <= 120
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("./launch.sh test")


def _tracked_text() -> list[Path]:
    """List the text files that git tracks or would add; without git, the Python files."""
    git_ls_files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    has_git = git_ls_files.returncode == 0
    names = git_ls_files.stdout.splitlines() if has_git else map(_name, EVERY_MODULE)
    files = [ROOT / name for name in names if not name.endswith((".safetensors", "tokenizer.json"))]
    return [file for file in files if file.is_file()]


def test_no_path_of_a_machine_and_no_package_index_is_written_down():
    """The project must not depend on folders or settings of one machine."""
    machine_specific = re.compile(
        r"/root/|/home/\w|/opt/\w+/|(extra-)?index-" + r"url|find-" + r"links"
    )
    violations = [
        f"{file}:{number}"
        for file in _tracked_text()
        for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), 1)
        if machine_specific.search(line) and file != Path(__file__)
    ]
    assert violations == []
