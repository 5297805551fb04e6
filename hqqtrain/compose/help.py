"""The text of `--help`, generated from the dataclasses and the recipes so that it stays true."""

from dataclasses import MISSING, Field, fields, is_dataclass
from textwrap import wrap
from typing import Any, cast

from hqqtrain import __doc__ as package_summary
from hqqtrain import __version__
from hqqtrain.compose.messages import expected_type
from hqqtrain.compose.recipes import VARIABLE, recipe_description, recipe_files
from hqqtrain.config.run import TASKS, RunConfig

_WIDTH, _INDENT, _COLUMN = 100, 2, 32
"""Characters per line, before the left column, and of the left column."""

_COMMANDS = {
    "recipe=NAME key=value ...": "run a recipe; keys on the command line override the recipe's",
    "-m key=value,value ...": "sweep: one run for every combination, each in its own process",
    "--check ...": "check the configuration and print the run's directory, without running",
    "--table ...": "write and print the table of a sweep, and its plots, from the results so far",
    "--cfg ...": "print the whole configuration as YAML, usable as a recipe, without running",
    "--version": "print the version",
}

_EXAMPLES = (
    "./launch.sh",
    "./launch.sh recipe=llama8b_2bit quant.group_size=32",
    "python -m hqqtrain recipe=tiny_2bit quant.nbits=3 train.max_steps=300",
    "python -m hqqtrain -m recipe=tiny_2bit quant.nbits=2,3,4 quant.group_size=32,64",
    "accelerate launch --multi_gpu --num_processes 8 -m hqqtrain recipe=llama70b_2bit",
    "python -m hqqtrain recipe=llama70b_2bit launch=slurm launch.nodes=2 launch.gpus_per_node=8",
)

_EXIT_CODES = {
    "0": "done, or the run had already finished",
    "2": "error in the configuration or the data; nothing was overwritten",
    "3": "preempted, state saved; run the same command again to resume",
    "1": "any other failure",
}


def help_text() -> str:
    """Return the whole text that `--help` prints."""
    recipes = {name: recipe_description(file) for name, file in sorted(recipe_files().items())}
    where = f"from ./recipes, the folders in {VARIABLE} and the built-in ones"
    return "\n\n".join(
        [
            "\n".join(wrap(f"{package_summary} Version {__version__}.", _WIDTH)),
            _table("Usage: python -m hqqtrain ..., or hqqtrain ...", _COMMANDS),
            "\n".join(["Examples", *(f"  {line}" for line in _EXAMPLES)]),
            _table("Tasks: task=...", TASKS),
            _table(f"Recipes: recipe=..., {where}", recipes),
            _keys(),
            _table("Exit codes", _EXIT_CODES),
        ]
    )


def _keys() -> str:
    title = "Keys and defaults; write lists as [a,b], no value as null, text with spaces in quotes"
    groups = [item for item in fields(RunConfig) if is_dataclass(item.default_factory)]
    lines = [title]
    for group in groups:
        name, schema = group.name, cast(Any, group.default_factory)
        rows = {f"{name}.{key.name}={_default(key)}": _help(name, key) for key in fields(schema)}
        lines.append(f"\n{_table(f'{name}: {schema.__doc__}', rows)}")
    return "\n".join(lines)


def _help(group: str, item: Field) -> str:
    choices = item.metadata["choices"]
    allowed = " | ".join(map(_show, choices)) if choices else expected_type(f"{group}.{item.name}")
    return f"{item.metadata['help']} ({allowed})"


def _default(item: Field) -> str:
    assert item.default_factory is not MISSING or item.default is not MISSING
    value = item.default if item.default is not MISSING else item.default_factory()  # type: ignore
    return _show(value)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_show, value))}]"
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else str(value)


def _table(title: str, rows: dict[str, str]) -> str:
    return "\n".join([title, *(_row(left, right) for left, right in rows.items())])


def _row(left: str, right: str) -> str:
    first, *rest = wrap(right, _WIDTH - _INDENT - _COLUMN) or [""]
    gap = " " * (_INDENT + _COLUMN)
    if len(left) < _COLUMN:
        head = f"{'':{_INDENT}}{left:<{_COLUMN}}{first}"
    else:  # too long for its column: the right column starts on the next line
        head = f"{'':{_INDENT}}{left}\n{gap}{first}"
    return "\n".join([head.rstrip(), *(gap + line for line in rest)])
