"""What may not become a batch file, told before anything is written."""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields

from hqqtrain.common.errors import UserError
from hqqtrain.common.secrets import mask_command, mask_secrets
from hqqtrain.config.infra import LaunchConfig
from hqqtrain.config.run import RunConfig

_REFERENCE = re.compile(r"""\w*=("?)\$(?:\w+|\{\w+\}|\([^()]*\))\1(?=[\s;&|,'"\]]|$)""")
"""A variable of the shell that is set from another, or from what a program prints."""


def check_same_launch(configs: Sequence[RunConfig]) -> None:
    """Raises UserError where the runs of a sweep ask slurm for different things."""
    first = configs[0].launch
    for launch in (config.launch for config in configs):
        for name in (item.name for item in fields(LaunchConfig)):
            one, another = getattr(first, name), getattr(launch, name)
            if one != another:
                raise UserError(
                    f"launch.{name}={another}: the runs of a sweep are one job array, and another "
                    f"has {one}; give them one value, or submit them one by one."
                )


def refuse_secrets(words: Iterable[str], launch: LaunchConfig) -> None:
    """A batch file is kept, shown and mailed. `export X=$X` and `X=$(cat file)` hold no secret.

    Raises UserError where `words` or what is to stand in the file as it is hold one.
    """
    lines = [_REFERENCE.sub("", line) for line in (*launch.setup, *launch.options)]
    held = [shown for line in lines if (shown := mask_secrets(line)) != line]
    given = [*without_launch(words), *(_REFERENCE.sub("", w) for w in words if _is_launch(w))]
    shown = mask_command(given)
    held += [shlex.quote(now) for word, now in zip(given, shown, strict=True) if now != word]
    if held:
        raise UserError(
            f"launch.backend=slurm: the batch file would hold a secret ({', '.join(held)}); "
            "give it as a variable of the environment, which sbatch passes on, or let launch.setup "
            "read a file: export NAME=$(cat FILE)."
        )


def refuse_backslash(root: str) -> None:
    """Raises UserError for a `root` with one."""
    if "\\" in root:
        raise UserError(
            f"run.root={root}: sbatch takes a backslash in the name of an output for a sign of its "
            "own, and would lose the job; choose another folder."
        )


def without_launch(words: Iterable[str]) -> list[str]:
    """Those that say what is run, not how it is started."""
    return [word for word in words if not _is_launch(word)]


def _is_launch(word: str) -> bool:
    return re.split("[.=]", word.lstrip("+"))[0] == "launch"
