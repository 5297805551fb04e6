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

TIMEOUT = 10.0
"""Seconds without an answer after which the hub counts as unreachable."""

# Configuration and tokenizer.
_SMALL = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]

# Other formats of the same weights that repositories contain in addition to the standard one.
_NEVER = ["*/*", "consolidated*", "*.fp16*"]

# HTTPError is httpx's or httpx2's, whichever the installed huggingface_hub uses.
_FAILURES = (
    HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError,
)  # fmt: skip


def download_snapshot(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """Return the local folder of the hub's model `name`; download what the cache lacks.

    Args:
        name: Name of the model on the hub.
        revision: Branch, tag or commit; None: the default branch.
        weights: Whether to download weights, not only configuration and tokenizer.

    Raises:
        UserError: The name or the revision does not exist, the model is gated, or the hub cannot
            be reached and the cache does not contain the model.
    """
    try:
        _ask(name, revision)
        return _snapshot(name, revision, weights)
    except _FAILURES as error:
        try:  # the cache may have it
            return _snapshot(name, revision, weights, cached=True)
        except (LocalEntryNotFoundError, HFValidationError):
            raise UserError(_explain(name, revision, error)) from error


def _ask(name: str, revision: str | None) -> None:
    """Request the model's metadata, to fail within `TIMEOUT` seconds.

    `snapshot_download` sets no time limit and may wait forever.
    """
    get_session().timeout = TIMEOUT
    HfApi().repo_info(name, revision=revision, timeout=TIMEOUT)


def _snapshot(name: str, revision: str | None, weights: bool, *, cached: bool = False) -> Path:
    wanted = _SMALL + (["*.safetensors"] if weights else [])
    folder = snapshot_download(
        name, revision=revision, allow_patterns=wanted, ignore_patterns=_NEVER,
        local_files_only=cached,
    )  # fmt: skip
    return Path(folder)


def _explain(name: str, revision: str | None, error: Exception) -> str:
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
