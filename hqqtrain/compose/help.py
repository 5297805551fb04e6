"""The text of `--help`, generated from the dataclasses and the recipes so that it stays true."""

from dataclasses import MISSING, Field, fields, is_dataclass
from textwrap import wrap
from typing import Any, cast

from hqqtrain import __doc__ as package_summary
from hqqtrain import __version__
from hqqtrain.compose.messages import expected_type
from hqqtrain.compose.recipes import RECIPES_VARIABLE, find_recipes, read_recipe_description
from hqqtrain.config.run import TASKS, RunConfig

_LINE_WIDTH, _INDENT, _LEFT_COLUMN_WIDTH = 100, 2, 32
"""Characters of a line, before the left column, and of the left column."""

_COMMANDS = {
    "recipe=NAME key=value ...": "run a recipe; keys on the command line override the recipe's",
    "-m key=value,value ...": "sweep: one run for every combination, each in its own process",
    "--check ...": "check the configuration, local models, data and patterns, and print the run's "
    "directory, without running",
    "--table ...": "write and print the table of a sweep, and its plots, from the results so far",
    "--cfg ..., -c ...": "print the whole configuration as YAML, usable as a recipe, without "
    "running",
    "--version": "print the version",
}

_EXAMPLES = (
    "./launch.sh",
    "./launch.sh recipe=llama8b_2bit quant.group_size=32",
    "python -m hqqtrain task=data data.source=./mine.jsonl model.name_or_path=./my-model",
    "python -m hqqtrain recipe=tiny_2bit quant.nbits=3 train.max_steps=300",
    "./launch.sh recipe=tiny_chat task=generate",
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
    recipes = {name: read_recipe_description(file) for name, file in sorted(find_recipes().items())}
    places = f"from ./recipes, the folders in {RECIPES_VARIABLE} and the built-in ones"
    return "\n\n".join(
        [
            "\n".join(wrap(f"{package_summary} Version {__version__}.", _LINE_WIDTH)),
            _table("Usage: python -m hqqtrain ..., or hqqtrain ...", _COMMANDS),
            "\n".join(["Examples", *(f"  {line}" for line in _EXAMPLES)]),
            _table("Tasks: task=...", TASKS),
            _table(f"Recipes: recipe=..., {places}", recipes),
            _all_keys(),
            _table("Exit codes", _EXIT_CODES),
        ]
    )


def _all_keys() -> str:
    """Return one table per config group, with the default and the help text of every key."""
    title = "Keys and defaults; write lists as [a,b], no value as null, text with spaces in quotes"
    tables = [title]
    for group in fields(RunConfig):
        if not is_dataclass(
            group.default_factory
        ):  # `task` and `recipe` have sections of their own
            continue
        name, schema = group.name, cast(Any, group.default_factory)
        rows = {
            f"{name}.{key.name}={_format_default(key)}": _help_of_key(name, key)
            for key in fields(schema)
        }
        tables.append(f"\n{_table(f'{name}: {schema.__doc__}', rows)}")
    return "\n".join(tables)


def _help_of_key(group: str, key: Field) -> str:
    """Return the help text of a key, with its allowed values or its type in parentheses."""
    choices = key.metadata["choices"]
    allowed = (
        " | ".join(map(_format_value, choices)) if choices else expected_type(f"{group}.{key.name}")
    )
    return f"{key.metadata['help']} ({allowed})"


def _format_default(key: Field) -> str:
    assert key.default_factory is not MISSING or key.default is not MISSING
    value = key.default if key.default is not MISSING else key.default_factory()  # type: ignore
    return _format_value(value)


def _format_value(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_format_value, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def _table(title: str, rows: dict[str, str]) -> str:
    return "\n".join([title, *(_row(left, right) for left, right in rows.items())])


def _row(left: str, right: str) -> str:
    """Return a row of two columns. The text of the right one is wrapped."""
    indent, right_indent = " " * _INDENT, " " * (_INDENT + _LEFT_COLUMN_WIDTH)
    lines = [right_indent + line for line in wrap(right, _LINE_WIDTH - len(right_indent))]
    if lines and len(left) < _LEFT_COLUMN_WIDTH:
        lines[0] = indent + left.ljust(_LEFT_COLUMN_WIDTH) + lines[0].lstrip()
    else:  # `left` is too long for its column, so the right column starts on the next line
        lines.insert(0, indent + left)
    return "\n".join(lines)
