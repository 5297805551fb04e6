"""Settings that let a training fit: each is tried, as in a plan of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.tasks.prediction import Prediction, Predictor

Settings = dict[str, Any]
"""Dotted key -> value."""

LEAST_EFFECT = 0.01
"""Smallest fraction of the memory that a change must save to be shown."""


@dataclass(frozen=True)
class Change:
    """Settings that were tried, and the plan with them.

    Attributes:
        settings: The keys that differ from the plan that did not fit.
        prediction: The plan with these settings.
    """

    settings: Settings
    prediction: Prediction

    def __str__(self) -> str:
        return " ".join(f"{key}={_shown(value)}" for key, value in self.settings.items())


def try_changes(predictor: Predictor, plan: Prediction) -> list[Change]:
    """Return the changes that save memory, those first that change the result the least.

    If none of them is enough, the last one combines some of them, as many as it takes.
    """
    changes = [_best_of(predictor, plan, ladder) for ladder in _ladders(plan)]
    helpful = [change for change in changes if change]
    if any(change.prediction.fits for change in helpful):
        return helpful
    combined = _combination(predictor, plan)
    return helpful + ([combined] if combined and len(combined.settings) > 1 else [])


def _combination(predictor: Predictor, plan: Prediction) -> Change | None:
    """Return changes together, each of which saves memory beside the ones before it."""
    combined = None
    for ladder in _ladders(plan):
        before = combined.prediction if combined else plan
        if before.fits or any("plan.gpus" in settings for settings in ladder):
            break
        settings: Settings = combined.settings if combined else {}
        combined = _best_of(predictor, before, [settings | each for each in ladder]) or combined
    return combined


def _ladders(plan: Prediction) -> Iterator[list[Settings]]:
    """Yield lists of settings with the same aim, each from the mildest to the strongest."""
    config, workload, on_gpu = plan.config, plan.workload, plan.machine.gpu is not None
    mode, micro_batch = workload.activation_checkpointing, workload.micro_batch_size
    modes = [*(["full"] if mode != "full" else []), *(["offload"] if on_gpu else [])]
    if mode != "offload":
        yield [{"train.activation_checkpointing": each} for each in modes]
    yield [{"train.micro_batch_size": size} for size in _halves(micro_batch, 1)]
    references = {"resident": ("streamed", "off"), "streamed": ("off",)}
    yield [{"eval.reference": each} for each in references.get(workload.reference, ())]
    if workload.calibration_tokens:
        yield [{"quant.calibration": None}]
    if on_gpu and not config.parallel.offloads_parameters:
        yield [{"parallel.strategy": "fsdp2", "parallel.offload": "parameters"}]
    if on_gpu and workload.optimizer != "paged_adamw_8bit":
        yield [{"optim.name": "paged_adamw_8bit"}]
    if config.adapter.dtype != "bf16" and plan.precision == "bf16":
        yield [{"adapter.dtype": "bf16"}]
    nbits = config.quant.nbits or 16
    yield [{"quant.nbits": bits} for bits in (4, 3, 2) if bits < nbits]
    yield [{"train.max_seq_len": length} for length in _halves(workload.max_seq_len, 512)]
    if on_gpu:
        more = (n for n in (2, 4, 8) if n > plan.machine.ranks)
        yield [{"plan.gpus": number, "parallel.strategy": "fsdp2"} for number in more]


def _best_of(predictor: Predictor, plan: Prediction, ladder: list[Settings]) -> Change | None:
    """Return the first change with which the training fits, or the last one; None if useless."""
    last = None
    for settings in ladder:
        try:
            prediction = predictor.predict(with_settings(plan.config, settings))
        except UserError:  # they contradict other settings
            continue
        last = Change(settings, prediction)
        if prediction.fits:
            break
    saves = last and last.prediction.needed < (1 - LEAST_EFFECT) * plan.needed
    return last if saves else None


def with_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """Return a copy of `config` with other values of some keys."""
    groups: dict[str, Any] = {}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        groups[group] = replace(groups.get(group, getattr(config, group)), **{name: value})
    return replace(config, **groups)


def _halves(number: int, least: int) -> list[int]:
    """Return half of `number`, a quarter of it, and so on, down to `least`."""
    halves = []
    while (number := number // 2) >= least:
        halves.append(number)
    return halves


def _shown(value: Any) -> str:
    """Return a value as on the command line."""
    return "null" if value is None else str(value)
