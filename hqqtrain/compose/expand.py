"""One command, many runs: every combination of the values that keys are given.

`-m quant.nbits=2,3` asks for it on the command line, `sweep: {quant.nbits: '2,3'}` in a recipe;
a recipe's key that the command line sets is swept no more. So the words of one job, which set
all of them, are an ordinary command.
"""

from itertools import product

from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep

from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_unchecked, parse_overrides


def expand_jobs(overrides: list[str], multirun: bool) -> list[list[str]]:
    """The command lines of all jobs; `[overrides]` where there is nothing to sweep over.

    `multirun` allows several values in `overrides`, as Hydra's basic sweeper does.
    """
    lines = _combinations(parse_overrides(overrides)) if multirun else [overrides]
    return [job for line in lines for job in _recipe_jobs(line)]


def _recipe_jobs(line: list[str]) -> list[list[str]]:
    sweep = compose_unchecked(line).sweep
    given = {override.key_or_group for override in parse_overrides(line)}
    swept = [f"{key}={values}" for key, values in sweep.items() if key not in given]
    return [line + job for job in _combinations(parse_overrides(swept))] if swept else [line]


def _combinations(overrides: list[Override]) -> list[list[str]]:
    return [list(job) for job in product(*map(_values, overrides))]


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not isinstance(override.value(), ChoiceSweep | RangeSweep):
        raise UserError(f"{override.input_line}: sweep over a list, 2,3,4, or a range(1,4).")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
