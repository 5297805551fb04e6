"""Download models from the Hugging Face hub, safely for a batch job.

A request never waits forever, and every failure becomes a message that the user can act on.
"""

from pathlib import Path

from huggingface_hub import HfApi, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hqqtrain.common.errors import UserError
from hqqtrain.common.hf_cache import hf_cache_error
from hqqtrain.common.packed_folders import HQQ_PICKLE

TIMEOUT_SECONDS = 10.0
"""Seconds without an answer after which the hub counts as unreachable."""

_CONFIG_PATTERNS = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
"""Files of configuration and tokenizer."""

_IGNORED_PATTERNS = [
    *(f"*/{pattern}" for pattern in ("*.json", "tokenizer*", "*.model", "*.txt", "*.safetensors")),
    "consolidated*", "*.fp16*",
]  # fmt: skip
"""Copies of the same weights in other formats, which many repositories contain, too. Chat templates
for tools may also be in a folder."""

_HUB_ERRORS = (
    HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError,
)  # fmt: skip
"""HTTPError is that of httpx or httpx2, whichever the installed huggingface_hub uses."""


def download_snapshot(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """Return the local folder of the hub's model `name`; download what the cache lacks.

    Args:
        name: Name of the model on the hub.
        revision: Branch, tag or commit; None: the default branch.
        weights: Whether to download weights, not only configuration and tokenizer.

    Raises:
        UserError: The name or the revision does not exist, the model is gated, or the hub cannot
            be reached and the cache does not contain the model, or the cache cannot be written to.
    """
    try:
        return _download_snapshot(name, revision, weights)
    except OSError as error:
        if cache_error := hf_cache_error(error):
            raise cache_error from error
        raise


def _download_snapshot(name: str, revision: str | None, weights: bool) -> Path:
    """Download the model, or find it in the cache if the hub fails."""
    try:
        _request_metadata(name, revision)
        return _snapshot(name, revision, weights)
    except _HUB_ERRORS as error:
        try:  # the cache may have the model
            return _snapshot(name, revision, weights, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            raise UserError(_hub_error_message(name, revision, error)) from error


def _request_metadata(name: str, revision: str | None) -> None:
    """Request the model's metadata, to fail within `TIMEOUT_SECONDS` if the hub does not answer.

    `snapshot_download` sets no time limit and may wait forever.
    """
    get_session().timeout = TIMEOUT_SECONDS
    HfApi().repo_info(name, revision=revision, timeout=TIMEOUT_SECONDS)


def _snapshot(
    name: str, revision: str | None, weights: bool, *, local_files_only: bool = False
) -> Path:
    folder = snapshot_download(
        name,
        revision=revision,
        allow_patterns=_CONFIG_PATTERNS + (["*.safetensors", HQQ_PICKLE] if weights else []),
        ignore_patterns=_IGNORED_PATTERNS,
        local_files_only=local_files_only,
    )
    return Path(folder)


def _hub_error_message(name: str, revision: str | None, error: Exception) -> str:
    """Return the message for a failure of the hub."""
    where = f"model.name_or_path={name}"
    if isinstance(error, HFValidationError):
        return f"{where}: neither a folder nor a hub name such as 'meta-llama/Meta-Llama-3-8B'."
    if isinstance(error, GatedRepoError):
        return (
            f"{where}: gated on the hub. Ask for access on its page, then `hf auth login` "
            "(or set HF_TOKEN)."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"model.revision={revision}: the hub's {name} has no such branch, tag or commit."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{where}: neither a folder here nor a model on the hub that you can access. Check the "
            "name; for a private model, `hf auth login` (or set HF_TOKEN)."
        )
    reason = str(error.__cause__ or error).splitlines()[0]
    return (
        f"{where}: no folder of that name exists, and the hub cannot be reached ({reason}). Give "
        "a local folder, or download the model once on a machine with network access "
        f"(`hf download {name}`) and share HF_HOME; on offline machines set HF_HUB_OFFLINE=1."
    )
