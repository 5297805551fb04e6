"""Expand a sweep into the command lines of its jobs, one for every combination of values.

A sweep is requested by `-m quant.nbits=2,3` on the command line or by `sweep: {quant.nbits: '2,3'}`
in a recipe. A key that the command line sets is not swept, even if the recipe sweeps it. The
command line of a job sets all swept keys, so it is an ordinary command of a single run.
"""

from itertools import product

from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep

from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_unchecked, parse_overrides
from hqqtrain.compose.schema import ComposedConfig


def expand_jobs(overrides: list[str], multirun: bool) -> list[tuple[list[str], ComposedConfig]]:
    """Return the command line of every job and what it composes to; a single run is one job.

    Args:
        overrides: The `key=value` arguments of the command line.
        multirun: Whether `overrides` may contain several values per key, as for Hydra's basic
            sweeper.

    Raises:
        UserError: an argument or the recipe is invalid, or a sweep is not over a list or range.
    """
    lines = _combinations(parse_overrides(overrides)) if multirun else [overrides]
    return [job for line in lines for job in _recipe_jobs(line)]


def _recipe_jobs(line: list[str]) -> list[tuple[list[str], ComposedConfig]]:
    composed = compose_unchecked(line)
    given = {override.key_or_group for override in parse_overrides(line)}
    swept = [f"{key}={values}" for key, values in composed.sweep.items() if key not in given]
    if not swept:
        return [(line, composed)]
    jobs = [line + job for job in _combinations(parse_overrides(swept))]
    return [(job, compose_unchecked(job)) for job in jobs]


def _combinations(overrides: list[Override]) -> list[list[str]]:
    return [list(job) for job in product(*map(_values, overrides))]


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not isinstance(override.value(), ChoiceSweep | RangeSweep):
        raise UserError(
            f"{override.input_line}: a sweep needs a list such as 2,3,4 or a range(1,4)."
        )
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
