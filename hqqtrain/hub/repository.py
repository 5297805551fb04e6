"""A repository of the Hub: check that it may be pushed to, and push files in one commit.

Each large file is sent alone before the commit. The Hub keeps it, so a push that was interrupted
continues with the next file. The commit comes last, so a reader never sees half of a model.
The `upload_large_folder` of huggingface_hub continues, too, but it commits in parts, and keeps its
state in the folder that is pushed.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from hqqtrain.common.errors import UserError
from hqqtrain.common.text import count, format_bytes
from hqqtrain.formats.adapter_config import CONFIG
from hqqtrain.formats.signed_card import CARD, is_signed_card
from hqqtrain.hub.card import is_of_hqqtrain
from hqqtrain.hub.errors import NO_TOKEN_ERROR, OFFLINE_ERROR, hub_errors

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 60.0
"""Seconds without any progress after which a request fails. The Hub checks a large file at the end
of its upload."""

_LARGE_BYTES = 1 << 20
"""Bytes from which a file is sent alone."""

_WEIGHTS = re.compile(r"[^/]+\.(safetensors|bin|pt|gguf|npz)")
"""Matches the weights of a model or an adapter at the root of a repository."""

_SHARDS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Matches the weights of a whole model. Loaders prefer some of these names to others, so those of
an earlier push must not stay."""


@dataclass(frozen=True)
class Repository:
    """A repository to push to.

    Attributes:
        name: `user/name`.
        origin: The beginning of messages: the key or argument that names it, with its value.
        is_private: Whether it is private.
        holds_adapter: Whether it gets an adapter, and not a model.
    """

    name: str
    origin: str
    is_private: bool
    holds_adapter: bool

    @classmethod
    def open(
        cls, name: str, origin: str, *, private: bool, private_key: str, holds_adapter: bool
    ) -> "Repository":
        """Create the repository, or check that it exists and may be written to.

        Args:
            name: `user/name`.
            origin: The beginning of messages.
            private: Whether a new repository is private.
            private_key: The name of this setting in messages.
            holds_adapter: Whether the repository gets an adapter, and not a model.

        Raises:
            UserError: The Hub cannot be reached, the token may not write, a private repository is
                wanted and it is public, or it contains something else.
        """
        check_account(origin)
        with hub_errors(origin):
            info = _info(name)
            if info is None:
                HfApi().create_repo(name, private=private, exist_ok=True)  # another may do it now
                logger.info("%s: created as a %s repository", name, _visibility(private))
                info = _info(name)
            is_private = bool(info.private) if info else private
        if private and not is_private:
            raise UserError(
                f"{origin}: is a public repository, and {private_key}=true; choose a new name, "
                f"make it private in its settings on the Hub, or set {private_key}=false."
            )
        if is_private and not private:
            logger.warning("%s: stays private; its settings on the Hub make it public", name)
        repository = cls(name, origin, is_private, holds_adapter)
        with hub_errors(origin):
            # The Hub answers how a file would be sent only to those who may send it.
            HfApi().preupload_lfs_files(name, [CommitOperationAdd(CARD, b"-")])
            repository._check_content()
        return repository

    @property
    def url(self) -> str:
        """The address of its page."""
        return repository_url(self.name)

    def push(
        self,
        files: Mapping[str, Path | bytes],
        message: str,
        *,
        check: Callable[[], object] = lambda: None,
        advice: str = "",
    ) -> int:
        """Send the files that the repository lacks, and commit all of them together.

        A card that was edited on the Hub stays there.

        Args:
            files: Name in the repository -> the file, or its content.
            message: The title of the commit.
            check: Called before each file; it may raise to stop.
            advice: The last sentence of a message about a failure.

        Returns:
            The number of files that were sent.

        Raises:
            UserError: The Hub has refused a file, or the connection has failed.
        """
        with hub_errors(self.origin, advice):
            info, remote = _info(self.name), self._files()
            additions = [
                CommitOperationAdd(name, str(file) if isinstance(file, Path) else file)
                for name, file in self._without_edited_card(files, remote).items()
            ]
            additions = [each for each in additions if not _is_same(each, remote)]
            removed = self._outdated(files, remote)
            self._send(additions, check)
            if additions or removed:
                check()
                operations: list[Any] = [*additions, *map(CommitOperationDelete, removed)]
                HfApi().create_commit(
                    self.name, operations, commit_message=message,
                    parent_commit=info.sha if info else None,
                )  # fmt: skip
        logger.info(
            "%s: %s sent; %s (%s)", self.name, count(len(additions), "file"), self.url,
            _visibility(self.is_private),
        )  # fmt: skip
        return len(additions)

    def _send(self, additions: Sequence[CommitOperationAdd], check: Callable[[], object]) -> None:
        """Send the content of large files, one after the other, and of the others together."""
        large = [each for each in additions if each.upload_info.size >= _LARGE_BYTES]
        for number, addition in enumerate(large, start=1):
            check()
            logger.info(
                "%s: sending %s (%s), large file %d of %d", self.name, addition.path_in_repo,
                format_bytes(addition.upload_info.size), number, len(large),
            )  # fmt: skip
            HfApi().preupload_lfs_files(self.name, [addition])
        check()
        others = [each for each in additions if each not in large]
        HfApi().preupload_lfs_files(self.name, others)

    def read(self, name: str) -> str | None:
        """Return the text of a file; None if the repository does not have it."""
        return _read(self.name, name) if name in self._files() else None

    def _files(self) -> dict[str, RepoFile]:
        entries = HfApi().list_repo_tree(self.name, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _check_content(self) -> None:
        """Refuse a repository with weights of another origin, or of the other kind."""
        names = self._files().keys()
        has_adapter, has_weights = CONFIG in names, any(map(_WEIGHTS.fullmatch, names))
        if not has_weights:
            return
        if has_adapter != self.holds_adapter:
            kinds = ("a model", "an adapter")
            raise UserError(
                f"{self.origin}: the repository has {kinds[has_adapter]}, and would get "
                f"{kinds[self.holds_adapter]}; loaders find one of them in a repository. Choose "
                "another name."
            )
        if not is_of_hqqtrain(self.read(CARD) or ""):
            raise UserError(
                f"{self.origin}: the repository has weights that hqqtrain has not pushed, and they "
                "would be replaced; choose another name. If they may be replaced, add the tag "
                "hqqtrain to its model card."
            )

    def _without_edited_card(
        self, files: Mapping[str, Path | bytes], remote: Mapping[str, RepoFile]
    ) -> Mapping[str, Path | bytes]:
        card = files.get(CARD)
        is_kept = CARD in remote and isinstance(card, bytes)  # not one that the user has written
        if not is_kept or is_signed_card(self.read(CARD) or ""):
            return files
        logger.warning("%s: the model card was edited on the Hub, and is kept", self.name)
        return {name: file for name, file in files.items() if name != CARD}

    def _outdated(
        self, files: Mapping[str, Path | bytes], remote: Mapping[str, RepoFile]
    ) -> Sequence[str]:
        """Return the weights of an earlier push that loaders would take for those of this one."""
        if not any(map(_SHARDS.fullmatch, files)):
            return ()
        return sorted(name for name in remote.keys() - files.keys() if _SHARDS.fullmatch(name))


def check_account(origin: str) -> str:
    """Return the name of the account that the token belongs to.

    Raises:
        UserError: There is no token, the Hub does not accept it, or it cannot be reached.
    """
    if is_offline_mode():
        raise UserError(f"{origin}: {OFFLINE_ERROR}")
    if get_token() is None:
        raise UserError(f"{origin}: {NO_TOKEN_ERROR}")
    get_session().timeout = REQUEST_SECONDS
    with hub_errors(origin):
        return str(HfApi().whoami()["name"])


def repository_url(name: str) -> str:
    """Return the address of the page of a repository."""
    return f"{HfApi().endpoint}/{name}"


def fingerprint_of(name: str, origin: str) -> str | None:
    """Return the fingerprint of the quantized model in a repository; None if there is none.

    Args:
        name: The repository, which may be missing.
        origin: The beginning of messages.

    Raises:
        UserError: The Hub cannot be reached.
    """
    check_account(origin)
    with hub_errors(origin):
        info = _info(name)
        names = [file.rfilename for file in info.siblings or ()] if info else []
        config = json.loads(_read(name, "config.json")) if "config.json" in names else {}
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    fingerprint = quantization.get("fingerprint") if isinstance(quantization, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None


def _read(name: str, file: str) -> str:
    return Path(HfApi().hf_hub_download(name, file)).read_text("utf-8", errors="replace")


def _info(name: str) -> Any:
    """Return what the Hub says about a repository; None if it does not exist."""
    try:
        return HfApi().model_info(name)
    except RepositoryNotFoundError:
        return None


def _visibility(private: bool) -> str:
    return "private" if private else "public"


def _is_same(addition: CommitOperationAdd, remote: Mapping[str, RepoFile]) -> bool:
    """Whether the repository has a file with the same name and content."""
    entry = remote.get(addition.path_in_repo)
    if entry is None or entry.size != addition.upload_info.size:
        return False
    if entry.lfs is not None:
        return addition.upload_info.sha256.hex() == entry.lfs.sha256
    with addition.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id
