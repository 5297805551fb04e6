"""Refuse commands that must not become a batch file, before any file is written."""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields

from hqqtrain.common.errors import UserError
from hqqtrain.common.secrets import mask_command, mask_secrets
from hqqtrain.common.shell_secrets import COMMAND_OUTPUT
from hqqtrain.config.infra import LaunchConfig
from hqqtrain.config.run import RunConfig

_REFERENCE = re.compile(
    rf"""\w*=("?)(?:\$\w+|\$\{{\w+\}}|{COMMAND_OUTPUT})\1(?=[\s;&|,'"\]]|$)""", re.VERBOSE
)
"""Matches a shell assignment of nothing but another variable, or the output of a program.

The lookahead refuses an addition, as in `X=$(f)pw`, which may be a secret.
"""


def check_same_launch(configs: Sequence[RunConfig]) -> None:
    """Check that all runs of a sweep request the same resources from Slurm.

    Raises:
        UserError: a `launch.*` value differs between two runs.
    """
    first = configs[0].launch
    for launch in (config.launch for config in configs):
        for name in (item.name for item in fields(LaunchConfig)):
            expected, value = getattr(first, name), getattr(launch, name)
            if value != expected:
                raise UserError(
                    f"launch.{name}={value}: the runs of a sweep are one job array, and another "
                    f"run has {expected}; use one value, or submit the runs one by one."
                )


def refuse_secrets(arguments: Iterable[str], launch: LaunchConfig) -> None:
    """Refuse secrets in a batch file, because the file is kept, shown and mailed.

    `export X=$X` and `X=$(cat file)` are allowed, because they contain no secret.

    Args:
        arguments: the arguments of the command.
        launch: `setup` and `options` are copied into the file verbatim.

    Raises:
        UserError: one of them contains a secret.
    """
    lines = [_REFERENCE.sub("", line) for line in (*launch.setup, *launch.options)]
    masked_secrets = [masked for line in lines if (masked := mask_secrets(line)) != line]
    checked = [
        *without_launch(arguments),
        *(_REFERENCE.sub("", argument) for argument in arguments if _is_launch(argument)),
    ]
    pairs = zip(checked, mask_command(checked), strict=True)
    masked_secrets += [shlex.quote(masked) for argument, masked in pairs if masked != argument]
    if masked_secrets:
        shown = ", ".join(masked_secrets)
        raise UserError(
            f"launch.backend=slurm: the batch file would contain a secret ({shown}); "
            "put it in an environment variable, which sbatch passes on, or let launch.setup "
            "read it from a file: export NAME=$(cat FILE)."
        )


def refuse_backslash(root: str) -> None:
    """Refuse a backslash in `run.root`.

    Raises:
        UserError: `root` contains a backslash.
    """
    if "\\" in root:
        raise UserError(
            f"run.root={root}: sbatch gives a backslash in the name of an output file a special "
            "meaning, and the job would be lost; choose another folder."
        )


def without_launch(arguments: Iterable[str]) -> list[str]:
    """Return the arguments without `launch.*`. They say what is run, not how it is started."""
    return [argument for argument in arguments if not _is_launch(argument)]


def _is_launch(argument: str) -> bool:
    """Whether the argument sets `launch` or a key of it, such as `+launch.nodes=2`."""
    return re.split("[.=]", argument.lstrip("+"))[0] == "launch"
