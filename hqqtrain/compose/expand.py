"""Expand a sweep into the command lines of its jobs, one for every combination of values.

A sweep is requested by `-m quant.nbits=2,3` on the command line or by `sweep: {quant.nbits: '2,3'}`
in a recipe. A key that the command line sets is not swept, even if the recipe sweeps it. The
command line of a job sets all swept keys, so it is an ordinary command of a single run.
"""

from itertools import product

from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep

from hqqtrain.common.errors import ErrorCollector, UserError
from hqqtrain.compose.compose import compose_unchecked, parse_overrides
from hqqtrain.compose.schema import ComposedConfig


def expand_jobs(overrides: list[str], multirun: bool) -> list[tuple[list[str], ComposedConfig]]:
    """Return the overrides of every job and what they compose to; a single run is one job.

    Args:
        overrides: The `key=value` arguments of the command line.
        multirun: Whether `overrides` may contain several values per key, as for Hydra's basic
            sweeper.

    Raises:
        UserError: an argument or the recipe is invalid, or a sweep is not over a list or range.
    """
    combinations = _combinations(parse_overrides(overrides)) if multirun else [overrides]
    jobs, errors = [], ErrorCollector()
    for combination in combinations:
        with errors.collect():
            jobs += _expand_recipe_sweep(combination)
    errors.raise_if_any()
    return jobs


def _expand_recipe_sweep(overrides: list[str]) -> list[tuple[list[str], ComposedConfig]]:
    """Return one job, or the jobs of the sweep of the recipe that `overrides` select."""
    composed = compose_unchecked(overrides)
    given = {override.key_or_group for override in parse_overrides(overrides)}
    swept = [f"{key}={values}" for key, values in composed.sweep.items() if key not in given]
    if not swept:
        return [(overrides, composed)]
    jobs, errors = [], ErrorCollector()
    for combination in _combinations(parse_overrides(swept)):
        with errors.collect():
            job = overrides + combination
            jobs.append((job, compose_unchecked(job)))
    errors.raise_if_any()
    return jobs


def _combinations(overrides: list[Override]) -> list[list[str]]:
    """Return the overrides of every job: the Cartesian product of the values of all keys."""
    return [list(combination) for combination in product(*map(_single_overrides, overrides))]


def _single_overrides(override: Override) -> list[str]:
    """Return one `key=value` for each value of a swept key: `a=1,2` -> `a=1`, `a=2`."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not isinstance(override.value(), ChoiceSweep | RangeSweep):
        raise UserError(
            f"{override.input_line}: a sweep needs a list such as 2,3,4 or a range(1,4)."
        )
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
