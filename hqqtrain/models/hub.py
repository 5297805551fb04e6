"""The hub, made safe for a job: no endless waiting, and failures a user can act on."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hqqtrain.common.errors import UserError

TIMEOUT = 10.0
"""Seconds without an answer after which the hub counts as unreachable."""

_SMALL = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]

# Other layouts of the same weights that repositories keep beside the standard one.
_NEVER = ["*/*", "consolidated*", "*.fp16*"]

_FAILURES = (
    HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled,
    httpx.HTTPError,
)  # fmt: skip


def download_snapshot(name: str, revision: str | None, *, weights: bool = True) -> Path:
    """The folder of the hub's model `name`; what the local cache lacks is downloaded.

    `weights=False` fetches configuration and tokenizer only. Raises UserError for a name that
    does not exist, a gated model, an unknown revision and a hub out of reach.
    """
    try:
        _ask(name, revision)
        return _snapshot(name, revision, weights)
    except _FAILURES as error:
        try:
            return _snapshot(name, revision, weights, cached=True)
        except (LocalEntryNotFoundError, HFValidationError):
            raise UserError(_explain(name, revision, error)) from error


def _ask(name: str, revision: str | None) -> None:
    """Raises in time what `snapshot_download`, which sets no limit, may wait for forever."""
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
            f"{where}: neither a folder here nor a model on the hub that you may see. Check the "
            "name; for a private model, `hf auth login` (or set HF_TOKEN)."
        )
    reason = str(error.__cause__ or error).splitlines()[0]
    return (
        f"{where}: no folder of that name is here, and the hub cannot be reached ({reason}). Give "
        "a local folder, or download the model once where there is a network (`hf download "
        f"{name}`) and share HF_HOME; offline machines set HF_HUB_OFFLINE=1."
    )
