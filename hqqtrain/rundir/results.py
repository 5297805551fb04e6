"""Whether the results of a finished run are still those that it has written.

A result may have been deleted, cut off, or replaced by that of another run. status.json records the
sizes and digests of the results when the run is done. Runs of the first release have not recorded
them. Checkpoints are no results: a user may delete them, and each has a manifest of its own.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from hqqtrain.common.digest import content_digest
from hqqtrain.common.errors import UserError
from hqqtrain.common.inputs import ADAPTER_FILES
from hqqtrain.common.reading import read_json
from hqqtrain.rundir.layout import RunLayout

_ADAPTER = tuple(f"adapter/{name}" for name in ADAPTER_FILES)

TRAINED_RESULTS = ("quantized/manifest.json", *_ADAPTER)
"""The recorded files of the model that a run has trained. A manifest stands for its folder, whose
files are verified before weights are loaded."""

_FILES = ("summary.json", *_ADAPTER)
_FOLDERS = ("quantized", "export")
"""The files, and the folders with files, that are recorded, relative to the run directory."""


def result_digests(layout: RunLayout) -> dict[str, str]:
    """Return name -> digest of the results that exist."""
    return {name: content_digest(layout.folder, [name]) for name in _existing(layout)}


def result_sizes(layout: RunLayout) -> dict[str, int]:
    """Return name -> bytes of the results that exist."""
    return {name: (layout.folder / name).stat().st_size for name in _existing(layout)}


def missing_results(layout: RunLayout) -> list[str]:
    """Return the names of the results that a finished run has recorded and that are missing now.

    Weights of a model that were cut off count as missing, because the run can write them again.
    """
    recorded: Iterable[str] = recorded_results(layout)
    if not recorded and "train" in read_json(layout.summary_json):
        recorded = _ADAPTER  # a run of the first release has trained
    sizes = _recorded(layout, "result_bytes")
    return [
        name
        for name in recorded
        if not (path := layout.folder / name).is_file()
        or (_is_weights(name) and path.stat().st_size < sizes.get(name, 0))
    ]


def check_results(layout: RunLayout, advice: str, names: Iterable[str] | None = None) -> None:
    """Check that results of a finished run are those that it has recorded.

    Args:
        layout: The paths of the run.
        advice: The last sentence of the message.
        names: The names of the results to check; None: all. Missing ones are not checked.

    Raises:
        UserError: A result is not what the run has written.
    """
    recorded = recorded_results(layout)
    for name in recorded if names is None else names:
        path = layout.folder / name
        is_recorded = name in recorded and path.is_file()
        if is_recorded and content_digest(layout.folder, [name]) != recorded[name]:
            raise UserError(
                f"{path}: is not what the run has written: a file of another run, or edited. "
                f"{advice}"
            )


def recorded_results(layout: RunLayout) -> Mapping[str, str]:
    """Return name -> digest of the results of a finished run; empty if it has recorded none."""
    return _recorded(layout, "results")


def _recorded(layout: RunLayout, key: str) -> dict[str, Any]:
    """Return result name -> value of `key` in status.json of a finished run."""
    status = read_json(layout.status_json)
    values = status.get(key) if status.get("status") == "done" else None
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if _is_result(name)}


def _is_weights(name: str) -> bool:
    return name.startswith(_FOLDERS) and name.endswith(".safetensors")


def _existing(layout: RunLayout) -> list[str]:
    folders = (layout.folder / name for name in _FOLDERS)
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    files += [layout.folder / name for name in _FILES]
    names = (str(path.relative_to(layout.folder)) for path in sorted(files) if path.is_file())
    return [name for name in names if _is_result(name)]


def _is_result(name: str) -> bool:
    """Whether a run records the file `name`. A model card and hidden files are the user's."""
    folder, _, file = name.partition("/")
    is_in_folder = folder in _FOLDERS and "/" not in file and not file.startswith(".")
    return name in _FILES or (is_in_folder and file not in ("", "README.md"))
