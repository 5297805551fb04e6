"""The pages name only files, modules, keys, recipes and symbols that exist."""

import re
import shlex
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import pytest
import torch

from hqqtrain.config.run import TASKS, RunConfig
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.spec import QuantSpec

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE, GLOSSARY = ROOT / "docs" / "architecture.md", ROOT / "docs" / "glossary.md"
EARLIER_LAYOUT = ("0011-tasks-above-train.md", "0012-front-end-and-back-end.md")
"""Pages that name modules as they were when the decision was taken."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in EARLIER_LAYOUT]
GROUPS = {name: group for name, group in asdict(RunConfig()).items() if isinstance(group, dict)}

PATH = re.compile(
    r"(?<![\w/.<>*])((?:\.ci|hqqtrain|kernels|docs|tests|scripts|recipes)/[\w./*-]*[\w*/])"
)
MODULE = re.compile(r"(?<![\w/.])(hqqtrain(?:_kernels)?(?:\.\w+)+)")
FILE = re.compile(r"(?<![\w/.<>*-])([\w./-]+\.(?:py|sh|sbatch))\b")
MUST_NOT_EXIST = ("kernels/__init__.py", "__init__.py", "hqqtrain/recipes")
"""Files that would hide another package, and a folder that only the wheel has."""
KEY = re.compile(rf"(?<![\w/.<-])({'|'.join(GROUPS)})\.(\w+)(?!\w)(?!\.(?:py|md|\d))")
NOT_KEYS = re.compile(
    r"(?:model|data|run|launch|hub|generate)\."
    r"(?:safetensors|layers|generation_config|push_to_hub|py|sh|md)|adapter\.gguf"
)
COMMAND = re.compile(r"(?:-m hqqtrain|\./launch\.sh) ((?:-m )?\w+=[^`#]*)")
RECIPE = re.compile(r"recipe=(\w+)")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def _files() -> tuple[Path, ...]:
    folders = ("hqqtrain", "kernels", "scripts", "tests", "recipes", "docs", ".ci")
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return tuple(path for path in paths if "__pycache__" not in path.parts)


@cache
def _words_of_the_code() -> frozenset[str]:
    """Return every word of the Python files, except for this one."""
    modules = (path for path in _files() if path.suffix == ".py" and path != Path(__file__))
    return frozenset(re.findall(r"\w+", " ".join(map(_read, modules))))


def missing_paths(text: str) -> list[str]:
    """Return the paths in `text` that do not exist; NAME stands for any name."""
    existing = [f"/{_name(path)}" for path in (*_files(), ROOT / "launch.sh")]
    paths = [path for path in PATH.findall(text) if not any(ROOT.glob(path.rstrip("/")))]
    # A page may also name a file by the end of its path, as in `strategies/base.py`.
    endings = (name.removeprefix("./") for name in FILE.findall(text))
    files = [end for end in endings if not any(path.endswith(f"/{end}") for path in existing)]
    missing = sorted({*paths, *files} - set(MUST_NOT_EXIST))
    return [path for path in missing if "NAME" not in path]


def missing_modules(text: str) -> list[str]:
    """Return the dotted names in `text` that are neither a module nor an attribute of one."""
    return [name for name in MODULE.findall(text) if not _is_module_or_attribute(name)]


def _is_module_or_attribute(name: str) -> bool:
    package, *parts = name.split(".")
    path = ROOT / ("kernels/hqqtrain_kernels" if package == "hqqtrain_kernels" else "hqqtrain")
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    if parts and (path / f"{parts[0]}.py").exists():
        path = path / f"{parts.pop(0)}.py"
    elif parts:  # a name that the package itself has
        path = path / "__init__.py"
    return path.exists() and all(re.search(rf"\b{part}\b", _read(path)) for part in parts)


def missing_keys(text: str) -> list[str]:
    """Return the keys in `text` that the configuration does not have."""
    text = NOT_KEYS.sub("", text)
    return [f"{group}.{key}" for group, key in KEY.findall(text) if key not in GROUPS[group]]


def missing_recipes(text: str) -> list[str]:
    """Return the recipes in `text` that do not exist; NAME stands for any recipe."""
    names = {path.stem for path in (ROOT / "recipes").glob("*.yaml")} | {"NAME"}
    return [name for name in RECIPE.findall(text) if name not in names]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_page_names_only_what_exists(page):
    text = _read(page)
    assert missing_paths(text) == []
    assert missing_modules(text) == []
    assert missing_keys(text) == []
    assert missing_recipes(text) == []


def _commands(page: Path) -> list[str]:
    """Return the arguments of every command of a page that has no placeholder."""
    text = _read(page).replace("\\\n", " ")  # join lines that end with a backslash
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    code = [*"".join(blocks).splitlines(), *re.findall(r"`([^`]+)`", prose)]
    commands = [" ".join(match[1].split()) for line in code if (match := COMMAND.search(line))]
    return [line for line in commands if not re.search(r"NAME|FOLDER| \.\.\.", line)]


COMMANDS = sorted({command for page in PAGES for command in _commands(page)})


def test_commands_are_found():
    assert len(COMMANDS) > 12


def _invalid_arguments(command: str) -> list[str]:
    """Return the arguments of a command that set no key, or a value that the key does not allow."""
    config, invalid = RunConfig(), []
    for argument in shlex.split(command.removeprefix("-m ")):
        name, _, value = argument.partition("=")
        if name in ("launch", "model"):  # the value names a file in hqqtrain/conf
            continue
        group, _, key = name.partition(".")
        choices_by_key: dict = {"recipe": (), "task": TASKS}
        if key:
            choices_by_key = {f.name: f.metadata["choices"] for f in fields(getattr(config, group))}
        choices = choices_by_key.get(key or group)  # empty if the key allows any value
        is_known = choices is not None
        allowed = {"null" if choice is None else str(choice) for choice in choices or ()}
        if not is_known or (choices and not set(value.split(",")) <= allowed):
            invalid.append(argument)
    return invalid


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_sets_allowed_values(command):
    """The test does not use Hydra: to compose all commands would take half a minute."""
    assert _invalid_arguments(command) == []


def test_an_invalid_argument_is_found():
    command = "-m quant.nbits=2,5 quant.nbits=2 quant.bits=2 task=quantize tusk=eval"
    assert _invalid_arguments(command) == ["quant.nbits=2,5", "quant.bits=2", "tusk=eval"]


def test_names_that_do_not_exist_are_found():
    assert missing_paths("`hqqtrain/nowhere.py`, docs/*.md, tests/quant/") == [
        "hqqtrain/nowhere.py"
    ]
    assert missing_paths("see `no_such_file.py` and `launch.sh`") == ["no_such_file.py"]
    assert missing_modules("hqqtrain.quant.spec.QuantSpec, hqqtrain.quant.spec.Gone") == [
        "hqqtrain.quant.spec.Gone"
    ]
    assert missing_keys("quant.nbits=2 quant.bits=2, model.safetensors") == ["quant.bits"]
    assert missing_recipes("recipe=tiny_2bit recipe=tiny_9bit") == ["tiny_9bit"]


def test_symbols_of_the_architecture_exist():
    """A renamed class or function must be renamed in the page, too."""
    prose = re.sub(r"```.*?```", "", _read(ARCHITECTURE), flags=re.DOTALL)
    spans = re.findall(r"`([A-Za-z_][\w.]*)`", prose)
    names = (part for span in spans if not KEY.search(span) for part in span.split("."))
    not_in_code = {"NAME", "pyproject", "toml"}
    assert sorted(set(names) - _words_of_the_code() - not_in_code) == []


def test_methods_of_the_architecture_are_in_the_file_of_their_class():
    source_of_class = {}
    for path in _files():
        if path.suffix == ".py" and path.parts[len(ROOT.parts)] != "tests":
            source = _read(path)
            classes = re.findall(r"^class (\w+)", source, re.MULTILINE)
            source_of_class |= dict.fromkeys(classes, source)
    spans = re.findall(r"`(\w+)\.(\w+)`", _read(ARCHITECTURE))
    methods = [(owner, name) for owner, name in spans if owner in source_of_class]
    assert len(methods) > 20
    missing = [
        f"{owner}.{name}"
        for owner, name in methods
        if not re.search(rf"\b{name}\b", source_of_class[owner])
    ]
    assert missing == []


def test_the_shapes_of_the_example_are_those_of_the_code():
    spec = QuantSpec(4, 64, 1, "least_squares", torch.bfloat16)
    layer = HQQLinear(4096, 4096, False, spec, compute_dtype=torch.bfloat16, device="meta")
    text = _read(ARCHITECTURE)
    saved = f"`W_q` U8 {list(layer.W_q.shape)}, `scale` and `zero` BF16 {list(layer.scale.shape)}"
    assert saved in text
    packed = layer.W_q.nbytes + layer.scale.nbytes + layer.zero.nbytes
    assert f"{packed // 2:,} bytes: {packed * 8 / 4096**2} bits per weight" in text
    layer.view_packed_as(torch.bfloat16)
    assert f"{list(layer.W_q.shape)} of it" in text.replace("\n", " ")


def test_words_of_the_glossary_are_used():
    """A word that the code no longer uses must be deleted from the glossary."""
    modules = (path for path in _files() if path.suffix == ".py" and path != Path(__file__))
    code = re.sub(r"[\s_]+", " ", " ".join(map(_read, modules))).lower()
    entries = re.findall(r"^\| \*\*(.*?)\*\*", _read(GLOSSARY), re.MULTILINE)
    words = [word for entry in entries for word in entry.lower().split(", ")]
    assert len(words) > 20
    assert [word for word in words if re.sub(r" \(.*\)", "", word) not in code] == []
