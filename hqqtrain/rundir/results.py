"""Whether the results of a finished run are still those that it has written.

A result may have been deleted, or replaced by that of another run. status.json records the digests
of the results when the run is done. Runs of the first release have not recorded them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from hqqtrain.common.digest import content_digest
from hqqtrain.common.errors import UserError
from hqqtrain.common.inputs import ADAPTER_FILES
from hqqtrain.common.reading import read_json
from hqqtrain.rundir.layout import RunLayout

_ADAPTER = tuple(f"adapter/{name}" for name in ADAPTER_FILES)

QUANTIZED = "quantized/manifest.json"

TRAINED_RESULTS = (QUANTIZED, *_ADAPTER)
"""The recorded files of the model that a run has trained. A manifest stands for its folder."""

_RESULTS = ("summary.json", *TRAINED_RESULTS, "export/config.json")
"""The files that are recorded, relative to the run directory."""


def result_digests(layout: RunLayout) -> dict[str, str]:
    """Return name -> digest of the results that exist."""
    existing = (name for name in _RESULTS if (layout.folder / name).is_file())
    return {name: content_digest(layout.folder, [name]) for name in existing}


def missing_results(layout: RunLayout) -> list[str]:
    """Return the names of the results that a finished run has recorded and that are missing now."""
    recorded: Iterable[str] = recorded_results(layout)
    if not recorded and "train" in read_json(layout.summary_json):
        recorded = _ADAPTER  # a run of the first release has trained
    missing = [name for name in recorded if not (layout.folder / name).is_file()]
    if QUANTIZED in recorded and QUANTIZED not in missing:
        missing += _missing_weights(layout)
    return missing


def _missing_weights(layout: RunLayout) -> list[str]:
    """Return the files of quantized/ that are missing or have another size than the manifest says.

    Their contents are verified before weights are loaded.
    """
    files = read_json(layout.folder / QUANTIZED).get("files")
    return [
        f"quantized/{name}"
        for name, entry in (files.items() if isinstance(files, dict) else ())
        if not _has_size(layout.quantized / name, entry["bytes"])
    ]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def check_results(layout: RunLayout, advice: str, names: Iterable[str] = _RESULTS) -> None:
    """Check that results of a finished run are those that it has recorded.

    Args:
        layout: The paths of the run.
        advice: The last sentence of the message.
        names: The names of the results to check. Missing ones are not checked.

    Raises:
        UserError: A result is not what the run has written.
    """
    recorded = recorded_results(layout)
    for name in names:
        path = layout.folder / name
        is_recorded = name in recorded and path.is_file()
        if is_recorded and content_digest(layout.folder, [name]) != recorded[name]:
            raise UserError(
                f"{path}: is not what the run has written: a file of another run, or edited. "
                f"{advice}"
            )


def recorded_results(layout: RunLayout) -> Mapping[str, str]:
    """Return name -> digest of the results of a finished run; empty if it has recorded none."""
    status = read_json(layout.status_json)
    results = status.get("results") if status.get("status") == "done" else None
    if not isinstance(results, dict):
        return {}
    return {name: digest for name, digest in results.items() if name in _RESULTS}
