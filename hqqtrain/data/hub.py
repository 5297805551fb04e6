"""Load data sets of the Hugging Face hub, with a message for every network failure.

By itself, `datasets` retries an unreachable hub for half a minute, and then raises an internal
error. So this module sends one short request to the hub first. If the hub does not answer, only the
local cache is used, and a log line says so. `datasets` imports pandas, so it is imported only when
a data set is loaded: the start of a run on local files is 0.7 seconds of CPU time shorter.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from hqqtrain.common.digest import content_digest
from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.common.hf_cache import hf_cache_error
from hqqtrain.config.groups import BUILT_IN_SOURCES
from hqqtrain.data.arrow import BATCH_ROWS, rows_of_batch
from hqqtrain.data.files import suggest_similar_name
from hqqtrain.data.rows import HEAD_ROWS, Row, RowError
from hqqtrain.data.splits import HELD_OUT_SPLITS, TRAIN, split_of_name

if TYPE_CHECKING:
    import datasets

    Split: TypeAlias = datasets.Dataset | datasets.IterableDataset
    Splits: TypeAlias = datasets.DatasetDict | datasets.IterableDatasetDict

logger = logging.getLogger(__name__)

REACH_SECONDS = 10.0
"""Timeout of the first request to the hub."""


@cache
def stream_hub_dataset(source: str, key: str) -> Splits:
    """Return all splits of a data set, whose rows are downloaded when they are read.

    The hub is asked once per process. Arguments and errors are those of `load_hub_dataset`.
    """
    return load_hub_dataset(source, key, streaming=True)


def load_hub_dataset(source: str, key: str, *, streaming: bool = False) -> Splits:
    """Load all splits of a data set.

    Args:
        source: `name`, or `name:configuration` if the data set has several configurations.
        key: The config key that contains `source`, for messages.
        streaming: Whether rows are downloaded only when they are read.

    Raises:
        UserError: The hub does not answer and the data set is not cached, the name or the
            configuration does not exist, the data set is gated, or the cache cannot be written to.
    """
    import datasets

    name, _, configuration = source.partition(":")
    datasets.disable_progress_bars()
    try:
        with _datasets_offline(not _is_hub_reachable(name, key)):
            options = {"streaming": True} if streaming else {}
            splits = datasets.load_dataset(name, configuration or None, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{key}={source}: {error}") from error
    except ConnectionError as error:
        raise UserError(_describe_unreachable(source, key)) from error
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if cache_error := hf_cache_error(error):
            raise cache_error from error
        message = " ".join(str(error).split())
        if "Config name is missing" in message:
            message += " Write it as name:configuration."
        raise UserError(f"{key}={source}: {message}") from error
    return splits


def hub_digest(source: str, key: str) -> str:
    """Return the digest of all splits of a data set, as the local cache has them.

    Raises:
        UserError: As for `load_hub_dataset`.
    """
    sha256 = hashlib.sha256()
    for name, split in load_hub_dataset(source, key).items():
        files = [Path(str(file["filename"])) for file in split.cache_files]
        if not files:  # the split is in memory
            digests = [str(split.to_dict())]
        else:
            digests = [content_digest(file.parent, [file.name]) for file in files]
        sha256.update(repr([str(name), split.num_rows, digests]).encode())
    return f"sha256:{sha256.hexdigest()}"


def find_hub_split(splits: Splits, *names: str) -> Split | None:
    """Return the first of the splits `names` that the data set has; None if it has none of them.

    A split may have another name, such as `dev` or `test_sft`, if no second one is of its kind.
    """
    for name in names:
        if name in splits:
            return splits[name]
        similar = [split for split in splits if split_of_name(str(split)) == name]
        if len(similar) == 1:
            return splits[similar[0]]
    return None


def select_hub_split(splits: Splits, names: Sequence[str], source: str, key: str) -> Split:
    """Return the first of the splits `names` that the data set has.

    If a data set has a single split, that one is returned.

    Raises:
        UserError: The data set has several splits, but not the right one.
    """
    found = find_hub_split(splits, *names)
    if found is not None:
        return found
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise UserError(
        f"{key}={source}: has no split {' or '.join(names)}; it has {', '.join(splits)}."
    )


def has_held_out(splits: Splits) -> bool:
    """Whether the data set has a train split and also a validation or test split."""
    kinds = ((TRAIN,), HELD_OUT_SPLITS)
    return all(find_hub_split(splits, *names) is not None for names in kinds)


class HubRows:
    """The rows of a split. Reading them in batches is 50 times faster than row by row.

    Args:
        rows: The split, which may be streamed.
        where: `key=source` for messages.
    """

    def __init__(self, rows: Split, where: str) -> None:
        self._rows, self._where = rows, where

    def read(
        self, columns: Collection[str] | None, text_column: str | None = None
    ) -> Iterator[tuple[str, Row | RowError]]:
        """Yield each row with its place; see `Rows.read`.

        Raises:
            UserError: `text_column` contains something else than text.
        """
        feature = (self._rows.features or {}).get(text_column)
        kind = getattr(feature, "dtype", "string")
        if kind not in ("string", "large_string", "null"):
            raise UserError(
                f"data.text_field={text_column}: contains {feature}, not text, in {self._where}."
            )
        split = f" of the split {self._rows.split}" if self._rows.split else ""
        number = 0
        try:
            for number, row in enumerate(self._iterate(columns), start=1):
                yield f"row {number}{split}", row
        except Exception as error:
            if hasattr(self._rows, "__len__"):
                raise
            # A streamed split is downloaded here. The errors depend on the library for HTTP.
            raise UserError(
                f"{self._where}: cannot read row {number + 1}{split}: "
                f"{' '.join(str(error).split())[:200]}. The same command resumes its run."
            ) from error

    def column_names(self) -> list[str]:
        """Return the names of the columns."""
        # A streamed split may know its columns only from its rows.
        return list(self._rows.column_names or next(iter(self._rows), {}))

    def head(self, columns: Collection[str] | None) -> list[Row]:
        """Return the first rows."""
        return list(islice(self._iterate(columns), HEAD_ROWS))

    def _iterate(self, columns: Collection[str] | None) -> Iterator[Row]:
        names = [n for n in self.column_names() if columns is None or n in columns]
        if not names:
            yield from ({} for _ in self._rows)
            return
        for batch in self._rows.select_columns(names).with_format("arrow").iter(BATCH_ROWS):
            yield from rows_of_batch(batch)


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
    import datasets

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
    hint = suggest_similar_name(Path(source)) or did_you_mean(source, BUILT_IN_SOURCES)
    return (
        f"{key}={source}: no file or folder of that name exists, the hub does not answer, and the "
        f"data set is not cached; give a path, or python_stdlib, which needs no network.{hint}"
    )
