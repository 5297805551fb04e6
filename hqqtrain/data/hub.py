"""Data sets of the Hugging Face hub, with messages for everything a network can do.

Left alone, `datasets` retries an unreachable hub for half a minute and then names an internal
error. One short question to the hub decides first: without an answer only the local cache is
asked, and a message says so.
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
from hqqtrain.data.files import nearest_names

logger = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds that the hub has for its first answer."""

_HELD_OUT_SPLITS = ("validation", "test")


def load_hub(source: str, key: str) -> datasets.DatasetDict:
    """Every split of the data set `name`, or `name:configuration` where it has several.

    Raises UserError where the hub does not answer and nothing is cached, and for a name or a
    configuration that does not exist, or asks for access.
    """
    name, _, configuration = source.partition(":")
    datasets.disable_progress_bars()
    try:
        with _offline(not _answers(name, key)):
            loaded = datasets.load_dataset(name, configuration or None)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{key}={source}: {error}") from error
    except ConnectionError as error:
        raise UserError(_unreachable(source, key)) from error
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{key}={source}: {_advice(str(error))}") from error
    return loaded


def hub_split(splits: datasets.DatasetDict, split: str, source: str, key: str) -> datasets.Dataset:
    """`train`, or for `held_out` the validation or test split; else the only split there is."""
    wanted = ("train",) if split == "train" else _HELD_OUT_SPLITS
    for name in wanted:
        if name in splits:
            return splits[name]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise UserError(f"{key}={source}: has no split {' or '.join(wanted)}, but {', '.join(splits)}.")


def has_held_out(splits: datasets.DatasetDict) -> bool:
    """True where the data set's authors set a validation or test split apart from train."""
    return "train" in splits and any(name in splits for name in _HELD_OUT_SPLITS)


def _answers(name: str, key: str) -> bool:
    """False where the hub is not to be reached; a UserError where it says no."""
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=TIMEOUT)
    except HFValidationError as error:
        raise UserError(f"{key}={name}: is no path and no hub name: {error}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403, 404):
            raise UserError(_refused(name, key, status)) from error
        return False
    except Exception as error:  # whatever the HTTP library of this hub version raises
        logger.info("the hub does not answer (%s); looking in the local cache", error)
        return False
    return True


@contextmanager
def _offline(active: bool) -> Iterator[None]:
    """Keeps `datasets` off the network, so that it reads its cache at once or fails at once."""
    places: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = active or place.HF_HUB_OFFLINE
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _refused(name: str, key: str, status: int) -> str:
    return (
        f"{key}={name}: no file or folder of that name here, and the hub answers {status}: no such "
        "data set, or one that asks for access; then request it on its page and set HF_TOKEN."
    )


def _unreachable(source: str, key: str) -> str:
    near = nearest_names(Path(source)) or did_you_mean(source, ["python_stdlib"])
    return (
        f"{key}={source}: no file or folder of that name here, the hub does not answer and its "
        f"cache does not hold it; give a path, or python_stdlib, which needs no network.{near}"
    )


def _advice(message: str) -> str:
    message = " ".join(message.split())
    if "Config name is missing" in message:
        return f"{message} Write it as name:configuration."
    return message
