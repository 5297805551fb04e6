"""Everything that decides the tokens of a run's data, for the name of a cache entry.

Contents decide, not the times of files (`docs/adr/0013-content-decides.md`).
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqqtrain.common.digest import content_digest
from hqqtrain.common.inputs import model_files
from hqqtrain.config.data_sources import source_paths
from hqqtrain.config.groups import AUTO, BUILT_IN_SOURCES
from hqqtrain.config.run import RunConfig
from hqqtrain.data.chat.library import chat_template_source
from hqqtrain.data.hub import hub_digest
from hqqtrain.data.single_source import is_hub_name
from hqqtrain.data.stdlib import stdlib_texts
from hqqtrain.rundir.identity import data_digests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODING_VERSION = 2
"""Raise it with every change of this program that changes tokens, their targets or their order.

Entries of other versions are not read any more.
"""

_PACKAGES = ("transformers", "tokenizers", "jinja2")
"""Packages that turn text into tokens."""

_OF_THE_MODEL = (".safetensors", ".index.json", "config.json")
"""Ends of names of files that do not belong to the tokenizer."""

_NO_TOKENS = ("show", "workers", "cache_dir", "streaming", "shuffle_buffer")
"""Keys of `data` that do not change any token."""


def token_identity(
    config: RunConfig, tokenizer: "PreTrainedTokenizerBase", folder: Path, **settings: Any
) -> dict[str, Any]:
    """Return everything that decides the tokens, as JSON.

    Args:
        config: The configuration.
        tokenizer: The tokenizer of the model.
        folder: Its folder.
        settings: Further settings that the tokens depend on, by config key.

    Raises:
        UserError: A file or a data set cannot be read.
    """
    data = {key: value for key, value in asdict(config.data).items() if key not in _NO_TOKENS}
    return {
        "version": [ENCODING_VERSION, sys.byteorder],
        "packages": {name: version(name) for name in _PACKAGES},
        "tokenizer": _tokenizer_identity(tokenizer, folder),
        "chat_template": chat_template_source(config.data.chat_template),
        "contents": dict(_contents(config)),
        "data": {**data, "source": str(config.data.source)},
        "eval.source": config.eval.source,
        **settings,
    }


def _tokenizer_identity(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> list[Any]:
    """Return what the tokenizer is: its files, and what transformers has made of them.

    The files alone do not decide it: config.json chooses the class of some tokenizers.
    """
    files = model_files(folder)
    names = [n for n in files if n == "tokenizer_config.json" or not n.endswith(_OF_THE_MODEL)]
    loaded = repr([
        sorted(tokenizer.get_added_vocab().items()),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else "",
    ])  # fmt: skip
    digest = hashlib.sha256(loaded.encode(errors="surrogatepass")).hexdigest()
    return [type(tokenizer).__name__, content_digest(folder, names), digest]


def _contents(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield a name and a digest of the content of everything that is read."""
    yield from data_digests(config).items()
    sources = [("data.source", path) for path in source_paths(config.data.source)]
    if config.eval.source not in (None, AUTO):
        sources.append(("eval.source", config.eval.source))
    for key, path in sources:
        if path in BUILT_IN_SOURCES:
            yield f"{key}={path}", _stdlib_digest()
        elif is_hub_name(path):
            yield f"{key}={path}", hub_digest(path, key)


@cache  # reading it takes a second, and it is the same for the whole process
def _stdlib_digest() -> str:
    """Return the digest of the standard library, from which the built-in sources are made."""
    sha256 = hashlib.sha256()
    for split in ("train", "held_out"):
        for name, text in stdlib_texts(split):
            sha256.update(f"{split} {name} {len(text)} {text}".encode(errors="surrogatepass"))
    return f"sha256:{sha256.hexdigest()}"
