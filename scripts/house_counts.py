"""Count what a reader of the source meets: sizes, names, prose, and dependencies on settings.

    python scripts/house_counts.py
    python scripts/house_counts.py --tree ../old --clump Plan,Built,Session,Record --details
    python scripts/house_counts.py --walk

Reads hqqtrain/ and kernels/hqqtrain_kernels/ of a tree with `ast` and imports nothing of them. A
function's length excludes its decorators; methods and nested functions count as functions too.
`--walk` runs a tiny finetune, and lists the files that it calls and those that it passes through on
the way from the command line to the kernels (`house_walk.py`).
"""

import argparse
import ast
import io
import math
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from house_walk import walk_finetune
from tabulate import tabulate

PACKAGES = ("hqqtrain", "kernels/hqqtrain_kernels")
STRATEGIES = frozenset({"single", "ddp", "fsdp2", "fsdp1", "zero3"})
STRATEGY_HOMES = re.compile(r"hqqtrain/(distributed/strategies/.*|dist/strategy\.py)")
"""Files that may compare the names of strategies: the old tree has one, the new one a package."""
OUTSIDE_BACK_END = frozenset(
    {"cli", "__main__", "compose", "conf", "launch", "sweep", "track", "tracking", "report"}
    | {"rundir", "config", "common"}
)
"""Packages of the front end and shared packages; the rest of hqqtrain is the back end."""
CLUMP = "Run,Runtime,ModelPlan,LoadedModel,RunnableModel,RunRecorder"
BAD_OPENINGS = re.compile(r"(Of|What|Else|Whose)\b")
FOR_TOOLS = re.compile(r"# *(fmt|noqa|type|mypy)\b")
TESTED_BY = {
    "kernels/hqqtrain_kernels/dequantize_any_triton": "test_dequantize_triton",
    "kernels/hqqtrain_kernels/dequantize_chunks_triton": "test_dequantize_triton",
    "kernels/hqqtrain_kernels/gemv_triton": "test_linear_triton",
    "kernels/hqqtrain_kernels/hqq_triton": "test_quantize_triton",
    "kernels/hqqtrain_kernels/least_squares_triton": "test_quantize_triton",
    "kernels/hqqtrain_kernels/loads_triton": "test_linear_triton",
    "kernels/hqqtrain_kernels/quantize_kernels_triton": "test_quantize_triton",
    "kernels/hqqtrain_kernels/skinny_gemm_triton": "test_linear_triton",
    "kernels/hqqtrain_kernels/skinny_operands_triton": "test_linear_triton",
    "kernels/hqqtrain_kernels/solver_params": "test_quantize_triton",
    "kernels/hqqtrain_kernels/tile_triton": "test_quantize_triton",
    "kernels/hqqtrain_kernels/wide_gemm_triton": "test_linear_triton",
}
"""Modules without a test of their name, and the test that runs all of their lines.

Each holds a kernel, or device functions inlined into one, and only the function that the test is
named after launches it. The three linear kernels get the same cases, so they share a test.
"""
LONG_FILE, LONG_FUNCTION, SHORT_FUNCTION = 300, 60, 5

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """A source file: its path below the tree, its text, and its syntax tree."""

    path: str
    text: str
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text, self.path)

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def package(self) -> str:
        """The name below hqqtrain/, such as `tasks`; `kernels` for hqqtrain_kernels."""
        return Path(self.path).parts[1 if self.path.startswith("hqqtrain/") else 0].split(".")[0]

    def comments(self) -> set[int]:
        """Return the numbers of the lines with a comment for people, not one for a tool."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        found = (token for token in tokens if token.type == tokenize.COMMENT)
        return {token.start[0] for token in found if not FOR_TOOLS.match(token.string)}

    def functions(self) -> Iterator[Function]:
        """Yield every function of the file, with methods and nested functions."""
        yield from (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def at(self, node: ast.AST, name: str = "") -> str:
        return f"{self.path}:{getattr(node, 'lineno', 0)} {name}".rstrip()


def main() -> int:
    """Print the table, and the places behind the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--clump", default=CLUMP, help="types that should not travel together")
    parser.add_argument("--details", action="store_true", help="also list the places")
    parser.add_argument("--walk", action="store_true", help="also list the files of a finetune")
    options = parser.parse_args()
    modules = read_tree(options.tree)
    tested = tested_stems(options.tree)
    places = find_places(modules, frozenset(options.clump.split(",")), tested)
    rows = [*sizes(modules), *names(modules)]
    rows += [[what, str(len(found))] for what, found in places.items()]
    if options.walk:
        files = walk_finetune(options.tree.resolve())
        called, chain = files["called"], files["chain"]
        packages = {str(Path(path).parent) for path in called}
        rows += [
            ["files that a finetune calls, folders of these", f"{len(called)}, {len(packages)}"],
            ["files that a finetune passes through from cli to the kernels", str(len(chain))],
        ]
        places["files that a finetune calls, in order"] = called
        places["files that a finetune passes through, on the stack of a training step"] = chain
    print(tabulate(rows, headers=["count", "value"], disable_numparse=True))
    for what, found in places.items():
        if found and (options.details or what.startswith("files that a finetune")):
            print(f"\n{what}:", *found, sep="\n  ")
    return 0


def read_tree(tree: Path) -> list[Module]:
    """Read every Python file of PACKAGES, sorted by path."""
    paths = sorted(path for package in PACKAGES for path in (tree / package).rglob("*.py"))
    return [Module(str(path.relative_to(tree)), path.read_text("utf-8")) for path in paths]


def tested_stems(tree: Path) -> set[str]:
    """Return the names of the modules that have a test of their name, or one in `TESTED_BY`.

    Raises:
        FileNotFoundError: `TESTED_BY` names a test that does not exist.
    """
    tests = {path.stem for path in tree.glob("tests/**/test_*.py")}
    stems = {test.removeprefix("test_") for test in tests}
    for module, test in TESTED_BY.items():
        if (tree / f"{module}.py").exists():  # another tree may not have it
            if test not in tests:
                raise FileNotFoundError(f"TESTED_BY: {module} names {test}, which does not exist")
            stems.add(Path(module).name)
    return stems


def sizes(modules: Sequence[Module]) -> list[list[str]]:
    """Return the rows on lines of files, functions and comments."""
    rows = []
    for package in PACKAGES:
        part = [module for module in modules if module.path.startswith(f"{package}/")]
        lines = [len(module.lines) for module in part]
        functions = [length(node) for module in part for node in module.functions()]
        short = sum(each <= SHORT_FUNCTION for each in functions)
        comments = sum(len(module.comments()) for module in part)
        rows += [
            [f"{package}: files, lines", f"{len(part)}, {sum(lines)}"],
            ["  lines of files: median, p90, max", spread(lines)],
            ["  functions: number", str(len(functions))],
            ["  lines of functions: median, p90, max", spread(functions)],
            [f"  functions of {SHORT_FUNCTION} lines or fewer", share(short, len(functions))],
            ["  lines with a comment", share(comments, sum(lines), 1)],
        ]
    return rows


def names(modules: Sequence[Module]) -> list[list[str]]:
    """Return the rows on public names of one word; module-level functions are the main figure."""
    rows = []
    for package in PACKAGES:
        bodies = [m.tree.body for m in modules if m.path.startswith(f"{package}/")]
        classes = [node for body in bodies for node in body if isinstance(node, ast.ClassDef)]
        methods = [
            node.name for each in classes for node in each.body if isinstance(node, Function)
        ]
        found = {
            "module-level functions": [
                n.name for b in bodies for n in b if isinstance(n, Function)
            ],
            "methods": methods,
            "functions and methods": [],
            "classes": [node.name for node in classes],
        }
        found["functions and methods"] = found["module-level functions"] + methods
        for what, listed in found.items():
            public = [name for name in listed if not name.startswith("_")]
            single = sum(map(is_one_word, public))
            rows.append([f"{package}: public {what} of one word", share(single, len(public))])
    return rows


def find_places(
    modules: Sequence[Module], clump: frozenset[str], tested: set[str]
) -> dict[str, list[str]]:
    """Return the places of everything that is counted one by one, by what it is."""
    found: dict[str, list[str]] = {
        "docstrings that begin with Of, What, Else or Whose": [],
        "strategy names compared outside the strategies": [],
        "functions with two or more parameters of the clump": [],
        "functions that take a RunConfig: back end below tasks": [],
        "functions that take a RunConfig: tasks": [],
        "functions that take a RunConfig: front end, config and common": [],
        "modules without a test_<module>.py": [],
        f"files over {LONG_FILE} lines": [],
        f"functions over {LONG_FUNCTION} lines outside *_triton.py": [],
    }
    prose, strategies, clumps, below, tasks, front_end, untested, files, functions = found.values()
    takers = {"tasks": tasks, **dict.fromkeys(OUTSIDE_BACK_END, front_end)}
    for module in modules:
        stem = Path(module.path).stem
        prose += [module.at(n) for n, text in docstrings(module.tree) if BAD_OPENINGS.match(text)]
        if not STRATEGY_HOMES.fullmatch(module.path):
            strategies += [module.at(node) for node in strategy_tests(module.tree)]
        if not stem.startswith("__") and stem not in tested:
            untested.append(module.path)
        if len(module.lines) > LONG_FILE:
            files.append(f"{module.path} {len(module.lines)}")
        for node in module.functions():
            types = [annotated_names(arg.annotation) for arg in parameters(node)]
            if sum(bool(names & clump) for names in types) >= 2:
                clumps.append(module.at(node, node.name))
            if any("RunConfig" in names for names in types):
                takers.get(module.package, below).append(module.at(node, node.name))
            if length(node) > LONG_FUNCTION and not stem.endswith("_triton"):
                functions.append(module.at(node, f"{node.name} {length(node)}"))
    return found


def length(node: Function) -> int:
    """Lines of a function without its decorators."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: Function) -> list[ast.arg]:
    """Return the named parameters of a function."""
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def annotated_names(annotation: ast.expr | None) -> set[str]:
    """Return the names in an annotation, such as {"Plan", "None"} of `Plan | None`."""
    found: set[str] = set()
    for node in ast.walk(annotation) if annotation else ():
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\w+", node.value))
    return found


def docstrings(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Yield every string that stands alone: docstrings and those below attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            yield from [(node, text.strip())] if isinstance(text, str) else []


def strategy_tests(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield comparisons, membership tests and match cases with the name of a strategy."""
    for node in ast.walk(tree):
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            operands += [x for each in operands if isinstance(each, _DISPLAYS) for x in each.elts]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        if any(isinstance(x, ast.Constant) and x.value in STRATEGIES for x in operands):
            yield node


_DISPLAYS = (ast.Tuple, ast.Set, ast.List)


def is_one_word(name: str) -> bool:
    """Whether a name in snake_case or CamelCase is a single word; `HQQLinear` is two."""
    if "_" in name.strip("_"):
        return False
    return len(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)) <= 1


def spread(numbers: Sequence[int]) -> str:
    """Return median, 90th percentile and maximum, by nearest rank."""
    if not numbers:
        return "-"
    ranked = sorted(numbers)
    at = [ranked[math.ceil(part * len(ranked)) - 1] for part in (0.5, 0.9, 1)]
    return ", ".join(map(str, at))


def share(part: int, whole: int, digits: int = 0) -> str:
    """Return such as `55 % (110 of 200)`."""
    return f"{100 * part / whole:.{digits}f} % ({part} of {whole})" if whole else "-"


if __name__ == "__main__":
    sys.exit(main())
