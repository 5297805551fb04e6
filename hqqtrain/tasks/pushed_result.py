"""Push one result of a run: its files without paths of this machine, and its model card."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.config.hub import HubConfig
from hqqtrain.formats.adapter_base import (
    check_fingerprint,
    is_quantized_base,
    read_metadata,
    recorded_fingerprint,
)
from hqqtrain.formats.adapter_config import WEIGHTS
from hqqtrain.formats.quantized_settings import read_quantized_settings
from hqqtrain.formats.signed_card import CARD
from hqqtrain.hub.card import HubCard
from hqqtrain.hub.files import WEIGHTS_SUFFIXES, check_private, result_files
from hqqtrain.hub.repository import Repository, fingerprint_of, repository_url
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.tasks.pushed_card import adapter_card, export_card, quantized_card
from hqqtrain.tasks.pushed_run import PushedRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A folder to push.

    Attributes:
        folder: The folder.
        name: The repository that gets it.
        origin: The beginning of messages: the config key that names the repository.
        base: The repository that an adapter in it names as its base.
        card: Makes the model card from what the run records.
        is_adapter: Whether it is an adapter, and not a model.
        is_named_base: Whether it is a base whose repository the user has named. Others may have
            pushed it, and other adapters may need it.
    """

    folder: Path
    name: str
    origin: str
    base: str
    card: Callable[[PushedRun], HubCard]
    is_adapter: bool = False
    is_named_base: bool = False


def quantized_result(
    folder: Path, name: str, origin: str = "", *, is_named_base: bool = False
) -> Result:
    """Return the quantized model in `folder`, for the repository `name`."""

    def card(run: PushedRun) -> HubCard:
        return quantized_card(name, run)

    origin = origin or f"hub.push={name}"
    return Result(folder, name, origin, name, card, is_named_base=is_named_base)


def adapter_result(folder: Path, name: str, base: str) -> Result:
    """Return the adapter in `folder`, whose base is in the repository `base`."""

    def card(run: PushedRun) -> HubCard:
        return adapter_card(name, run, base, folder)

    return Result(folder, name, f"hub.push={name}", base, card, is_adapter=True)


def export_result(folder: Path, name: str) -> Result:
    """Return the export in `folder`."""
    origin = f"hub.push={name}"
    return Result(folder, name, origin, name, lambda run: export_card(name, run, folder))


def results_of_training(
    layout: RunLayout, hub: HubConfig, dense_base: str | None = None
) -> list[Result]:
    """Return what a training pushes: the quantized base, and then the adapter that names it.

    Args:
        layout: The paths of its directory.
        hub: The group `hub` of the configuration; `push` is not None.
        dense_base: The repository of the base if nothing is quantized.
    """
    assert hub.push is not None
    if dense_base is not None:
        return [adapter_result(layout.adapter, hub.push, dense_base)]
    base, is_named = hub.base_repository, hub.base is not None
    origin = f"hub.base={base}" if is_named else f"hub.push={hub.push}, its base {base}"
    return [
        quantized_result(layout.quantized, base, origin, is_named_base=is_named),
        adapter_result(layout.adapter, hub.push, base),
    ]


def check_result(result: Result, hub: HubConfig) -> None:
    """Check that a result, which may not exist yet, can be pushed; create its repository.

    Raises:
        UserError: It cannot.
    """
    # If a named base is the same as ours, it need not be written. That is known later.
    if not (result.is_named_base and fingerprint_of(result.name, result.origin)):
        _open(result, hub)


def push_result(
    result: Result,
    run: PushedRun,
    hub: HubConfig,
    private: Sequence[str],
    *,
    check: Callable[[], object] = lambda: None,
    advice: str = "",
) -> str:
    """Push one result, and return the address of its repository.

    Args:
        result: The result.
        run: What its run records.
        hub: The group `hub` of the configuration.
        private: Paths of this machine that must not be in a file.
        check: Called before each file; it may raise to stop.
        advice: The last sentence of a message about a failure.

    Raises:
        UserError: It was not pushed.
    """
    if result.is_named_base and _has_same_base(result):
        logger.info("%s: has this base already", result.name)
        return repository_url(result.name)
    files = result_files(result.folder, result.base)
    if not any(name.endswith(WEIGHTS_SUFFIXES) for name in files):
        raise UserError(
            f"{result.folder}: has no weights that can be pushed; they are in files named "
            f"{' or '.join(f'*{suffix}' for suffix in WEIGHTS_SUFFIXES)}."
        )
    repository = _open(result, hub)
    if result.is_adapter:
        _check_base(result)
    if CARD not in files:
        files[CARD] = result.card(run).render().encode()
    check_private(files, private)
    repository.push(files, f"Push {result.folder.name} with hqqtrain", check=check, advice=advice)
    return repository.url


def _open(result: Result, hub: HubConfig) -> Repository:
    return Repository.open(
        result.name, result.origin, private=hub.private, private_key="hub.private",
        holds_adapter=result.is_adapter,
    )  # fmt: skip


def _has_same_base(result: Result) -> bool:
    """Whether the repository of a base has the same packed weights already.

    Raises:
        UserError: It has others, whose adapters would no longer fit.
    """
    there = fingerprint_of(result.name, result.origin)
    here = read_quantized_settings(result.folder).fingerprint
    if there not in (None, here):
        raise UserError(
            f"{result.origin}: has another quantized base ({there}) than this one ({here}), and "
            "its adapters would no longer fit; choose a new name."
        )
    return there is not None


def _check_base(result: Result) -> None:
    """Check that the base that an adapter will name is the one that it was trained on.

    Raises:
        UserError: It is another one, or not on the Hub.
    """
    metadata = read_metadata(result.folder / WEIGHTS)
    if is_quantized_base(metadata):
        there = fingerprint_of(result.base, result.origin) or "not quantized by hqqtrain"
        advice = (
            f"Push the quantized base to {result.base} first, or set hub.base to its repository."
        )
        trained_on = recorded_fingerprint(metadata)
        check_fingerprint(trained_on, there, f"{result.origin}, with {result.base}", advice)
