"""Load data sets of the Hugging Face hub, with a message for every network failure.

By itself, `datasets` retries an unreachable hub for half a minute, and then raises an internal
error. So this module sends one short request to the hub first. If the hub does not answer, only the
local cache is used, and a log line says so.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.data.files import suggest_similar_name

logger = logging.getLogger(__name__)

REACH_SECONDS = 10.0
"""Timeout of the first request to the hub."""

_HELD_OUT_SPLITS = ("validation", "test")


def load_hub_dataset(source: str, key: str) -> datasets.DatasetDict:
    """Load all splits of a data set.

    Args:
        source: `name`, or `name:configuration` if the data set has several configurations.
        key: The config key that contains `source`, for messages.

    Raises:
        UserError: The hub does not answer and the data set is not cached, the name or the
            configuration does not exist, or the data set is gated.
    """
    name, _, configuration = source.partition(":")
    datasets.disable_progress_bars()
    try:
        with _datasets_offline(not _is_hub_reachable(name, key)):
            splits = datasets.load_dataset(name, configuration or None)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{key}={source}: {error}") from error
    except ConnectionError as error:
        raise UserError(_describe_unreachable(source, key)) from error
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        message = " ".join(str(error).split())
        if "Config name is missing" in message:
            message += " Write it as name:configuration."
        raise UserError(f"{key}={source}: {message}") from error
    return splits


def select_hub_split(
    splits: datasets.DatasetDict, split: str, source: str, key: str
) -> datasets.Dataset:
    """Return the data set's own split for `split`, which is `train` or `held_out`.

    For `held_out` this is the validation or the test split. If a data set has a single split, that
    one is returned.

    Raises:
        UserError: The data set has several splits, but not the right one.
    """
    names = ("train",) if split == "train" else _HELD_OUT_SPLITS
    for name in names:
        if name in splits:
            return splits[name]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise UserError(
        f"{key}={source}: has no split {' or '.join(names)}; it has {', '.join(splits)}."
    )


def has_held_out(splits: datasets.DatasetDict) -> bool:
    """Whether the data set has a train split and also a validation or test split."""
    return "train" in splits and any(name in splits for name in _HELD_OUT_SPLITS)


def _is_hub_reachable(name: str, key: str) -> bool:
    """Whether the hub answers a request for the data set `name`.

    Raises:
        UserError: The hub answers that it has no such data set, or refuses access.
    """
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=REACH_SECONDS)
    except HFValidationError as error:
        raise UserError(f"{key}={name}: neither a path nor a hub name: {error}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403, 404):
            raise UserError(_describe_refusal(name, key, status)) from error
        return False
    except Exception as error:  # the HTTP library, and so its errors, depend on huggingface_hub
        logger.info("the hub does not answer (%s); using the local cache", error)
        return False
    return True


@contextmanager
def _datasets_offline(is_offline: bool) -> Iterator[None]:
    """Put `datasets` into offline mode if `is_offline`: it uses its cache or fails at once."""
    modules: list[Any] = [datasets.config, huggingface_hub.constants]
    previous = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = is_offline or module.HF_HUB_OFFLINE
    try:
        yield
    finally:
        for module, value in zip(modules, previous, strict=True):
            module.HF_HUB_OFFLINE = value


def _describe_refusal(name: str, key: str, status: int) -> str:
    """Return the error message if the hub answers 401, 403 or 404."""
    return (
        f"{key}={name}: no file or folder of that name exists, and the hub answers {status}: "
        "the data set does not exist, or it is gated; in that case request access on its page "
        "and set HF_TOKEN."
    )


def _describe_unreachable(source: str, key: str) -> str:
    """Return the error message if the hub does not answer and the cache lacks the data set."""
    hint = suggest_similar_name(Path(source)) or did_you_mean(source, ["python_stdlib"])
    return (
        f"{key}={source}: no file or folder of that name exists, the hub does not answer, and the "
        f"data set is not cached; give a path, or python_stdlib, which needs no network.{hint}"
    )
