"""The tokenizer of a run: that of its model, with the tokens and the chat template of `data`.

Whatever a run saves gets a copy of this tokenizer, so that a model is served with the template and
the tokens that it was trained with.
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AddedToken, PreTrainedTokenizerBase

from hqqtrain.common.errors import UserError
from hqqtrain.common.text import count
from hqqtrain.config.groups import AUTO, DataConfig
from hqqtrain.data.chat.library import chat_template_source
from hqqtrain.data.chat.markers import is_token, missing_markers, single_id
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.formats.companions import (
    ADDITIONAL_TEMPLATES,
    companion_files,
    copy_companion_files,
)
from hqqtrain.models.source import ModelSource
from hqqtrain.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_folders: list[TemporaryDirectory[str]] = []
"""The tokenizers that this process has written; they are deleted when it ends."""


def prepare_tokenizer(source: ModelSource, data: DataConfig) -> ModelSource:
    """Return `source` with the tokenizer that `data.add_tokens` and `data.chat_template` ask for.

    Every rank writes the same tokenizer into a temporary folder of its own.

    Raises:
        UserError: The template or the tokenizer cannot be read, or a token cannot be added.
    """
    template = chat_template_source(data.chat_template)
    if template is None and not data.add_tokens:
        return source
    tokenizer = load_tokenizer(source.tokenizer)
    size, ids = len(tokenizer), add_tokens(tokenizer, data, template)
    _folders.append(TemporaryDirectory(prefix="hqqtrain-tokenizer-"))
    folder = Path(_folders[-1].name)
    copy_companion_files(companion_files(source.tokenizer), folder)
    if (config := source.tokenizer / "config.json").is_file():
        # transformers chooses the class of some tokenizers by the type of the model.
        shutil.copyfile(config, folder / config.name)
    if len(tokenizer) > size:
        tokenizer.save_pretrained(folder)
    if template is not None:
        shutil.rmtree(folder / ADDITIONAL_TEMPLATES, ignore_errors=True)
        # transformers prefers this file to a template in tokenizer_config.json.
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return replace(source, tokenizer_folder=folder, trained_token_ids=ids)


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, data: DataConfig, template: str | None
) -> tuple[int, ...]:
    """Add the tokens of `data.add_tokens` to `tokenizer` as special tokens; return their ids.

    A listed token that the tokenizer has already stays as it is. Its id is returned, too, because
    base models often have tokens that were never trained. With `auto`, only new ones are returned.

    Args:
        tokenizer: The tokenizer, changed in place.
        data: The group `data` of the configuration.
        template: The Jinja text of `data.chat_template`; None: the tokenizer's own.

    Raises:
        UserError: The tokenizer does not make a single token of one of them.
    """
    if data.add_tokens == AUTO:
        tokens = missing_markers(ChatTemplate(tokenizer, template), tokenizer)
    else:
        tokens = list(dict.fromkeys(data.add_tokens or ()))
    new = [token for token in tokens if not is_token(token, tokenizer)]
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True
    )
    ids = tuple(_single_id(token, tokenizer) for token in tokens)
    if tokens:
        logger.info(
            "data.add_tokens: the embeddings of %s are trained (%d new): %s",
            count(len(tokens), "token"), len(new), ", ".join(tokens),
        )  # fmt: skip
    return ids


def _single_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a text that must be a token."""
    if (token_id := single_id(token, tokenizer)) is None:
        raise UserError(
            f"data.add_tokens={token}: the tokenizer of the model cannot make it a token; choose "
            "another text, without spaces around it."
        )
    return token_id
