"""The markers of a chat template, such as `<|im_start|>`, that a tokenizer does not have as tokens.

Base models often lack them. They are then trained as several tokens of ordinary text, which works,
but costs tokens and lets a user's text imitate them.
"""

import re
from typing import TYPE_CHECKING

from hqqtrain.data.chat.end_markers import render_probes
from hqqtrain.data.chat.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(
    r"<[|\uff5c][^<>\s]{1,40}?[|\uff5c]>|</?[a-z0-9]+(?:_[a-z0-9]+)+>|\[/?[A-Z_]{2,40}\]"
)


def missing_markers(template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the markers around the turns of a short chat that are no tokens of `tokenizer`."""
    turns = [{"role": role, "content": "probe"} for role in ("user", "assistant", "user")]
    texts = [
        render_probes(template, *chat, add_generation_prompt=True)
        for chat in (turns, [{"role": "system", "content": "probe"}, *turns])
    ]
    markers = dict.fromkeys(match.group() for match in _MARKER.finditer("".join(texts)))
    return [marker for marker in markers if not is_token(marker, tokenizer)]


def is_token(text: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether `text` is a single token."""
    return single_id(text, tokenizer) is not None


def single_id(text: str, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the id of a text that is a single token; None if it is not."""
    added = tokenizer.get_added_vocab()
    ids = [added[text]] if text in added else tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None
