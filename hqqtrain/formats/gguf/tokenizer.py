"""Write a tokenizer of Hugging Face into the metadata of a GGUF file.

llama.cpp has two kinds of tokenizers for the families that we know: `gpt2`, which merges bytes by a
list of merges, and `llama`, which is SentencePiece's: it merges characters by the scores of the
results. tokenizer.json has merges for both, from whose order the scores follow.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import load_json
from hqqtrain.formats.companions import GENERATION_CONFIG
from hqqtrain.formats.gguf.pre_tokenizer import pre_tokenizer_name
from hqqtrain.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's space."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's types of tokens."""


def write_tokenizer(writer: Any, folder: Path, vocab_size: int, settings: Path) -> None:
    """Add the tokenizer to a `GGUFWriter`.

    Args:
        writer: The writer.
        folder: The folder of the tokenizer.
        vocab_size: The rows of the embedding, which may be more than the tokens.
        settings: The folder of the generation settings.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    content = _content(tokenizer, folder)
    is_spm = content["model"].get("byte_fallback", False)
    vocabulary = tokenizer.get_vocab()
    tokens, types = _tokens(content, vocabulary, vocab_size, folder, is_spm=is_spm)
    writer.add_tokenizer_model("llama" if is_spm else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [_pair(merge) for merge in content["model"]["merges"]]
    if is_spm:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        first = tokenizer.encode("a", add_special_tokens=False)[0]
        writer.add_add_space_prefix(tokens[first].startswith(_SPACE))
    else:
        writer.add_tokenizer_pre(_pre_tokenizer(content, folder))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _write_special_tokens(writer, tokenizer, settings)
    _write_template(writer, tokenizer.chat_template)


def _content(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Return the content of tokenizer.json, which must have a BPE model that llama.cpp knows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend else {"model": {"type": "slow"}}
    model = content["model"]
    is_byte_level = "ByteLevel" in json.dumps([content.get("pre_tokenizer"), content["decoder"]])
    if model["type"] != "BPE" or not (model.get("byte_fallback") or is_byte_level):
        raise UserError(
            f"{folder}: export.format=gguf: has a tokenizer of the kind {model['type']}, and "
            "llama.cpp has BPE of bytes or SentencePiece's. Set export.llama_cpp to the folder of "
            "llama.cpp, whose converter may know it."
        )
    return content


def _tokens(
    content: Mapping[str, Any], vocabulary: Mapping[str, int], size: int, folder: Path, *,
    is_spm: bool,
) -> tuple[list[str], list[int]]:  # fmt: skip
    """Return the texts and types of all tokens; rows of the embedding without one are unused."""
    if max(vocabulary.values()) >= size:
        raise UserError(
            f"{folder}: its tokenizer has a token {max(vocabulary.values())}, and the embedding of "
            f"the model has {size} rows; use the tokenizer that belongs to the model."
        )
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    unknown = content["model"].get("unk_token")
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, UNKNOWN if is_spm and token == unknown else NORMAL
        if is_spm and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    for added in content["added_tokens"]:
        i, token = added["id"], added["content"]
        if types[i] == UNKNOWN:
            continue
        types[i] = CONTROL if added["special"] else USER_DEFINED
        if is_spm and _SPACE in token and not added["special"]:
            # The algorithm finds it after spaces were replaced; llama.cpp looks for others before.
            types[i] = USER_DEFINED if added["normalized"] else NORMAL
            tokens[i] = token.replace(_SPACE, " ") if added["normalized"] else token
    return tokens, types


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Return the two parts of a merge, which older files have as one text."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Return scores with which SentencePiece's algorithm merges in the order of `merges`."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _pre_tokenizer(content: Mapping[str, Any], folder: Path) -> str:
    name, is_known = pre_tokenizer_name(content)
    if not is_known:
        logger.warning(
            "export.format=gguf: llama.cpp has no rule that splits texts just as the tokenizer in "
            "%s. It gets the nearest, %s, so some texts become other tokens.", folder, name,
        )  # fmt: skip
    return name


def _write_special_tokens(writer: Any, tokenizer: Any, settings: Path) -> None:
    """Add the ids of special tokens, and whether they are put around a text."""
    for name, add in (
        ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id),
    ):  # fmt: skip
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(token)
    path = settings / GENERATION_CONFIG
    ends = load_json(path).get("eos_token_id") if path.is_file() else None
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and token != tokenizer.eos_token_id:
            writer.add_eot_token_id(token)
            break
    ids = tokenizer.encode("a")
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    )
    writer.add_add_eos_token(
        tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    )


def _write_template(writer: Any, template: str | Mapping[str, str] | None) -> None:
    if isinstance(template, Mapping):
        writer.add_chat_template([{"name": k, "template": v} for k, v in template.items()])
    elif template:
        writer.add_chat_template(template)
