"""Turn prompts and chats into tokens, as they were in the training."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hqqtrain.common.errors import UserError
from hqqtrain.data.chat.end_markers import end_markers
from hqqtrain.data.chat.markers import single_id
from hqqtrain.data.chat.template import ChatTemplate, RenderError
from hqqtrain.data.examples import Message
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.models.families.positions import shortest_position_table
from hqqtrain.models.families.structure import text_config

Prompt = str | Sequence[Message]
"""A text to continue, or the words of a user; or the messages of a chat."""


def list_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts of one prompt or of several.

    Raises:
        UserError: One is neither a text nor the messages of a chat.
    """
    is_single = isinstance(prompts, str) or _is_chat(prompts)
    listed: Any = prompts if isinstance(prompts, Sequence) and not is_single else [prompts]
    for prompt in listed:
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise UserError(
                f"prompts: {reprlib.repr(prompt)} is neither a text nor the messages of a chat; "
                'pass "a text", or [{"role": "user", "content": "a text"}], or a list of these.'
            )
    return [*listed]


def _is_chat(prompt: object) -> bool:
    """Whether a prompt is a list of messages; an empty list is none."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) for message in prompt)
    )


class PromptEncoder:
    """Encodes prompts for a model.

    Args:
        model: The model, whose vocabulary and context limit the prompts.
        tokenizer: Its tokenizer.
        chat: Whether a text is the message of a user, to be answered, and not a beginning that is
            continued; None: whether the tokenizer has a chat template.
        system: The system message of chats that have none.

    Attributes:
        context: Largest number of tokens of a prompt and its continuation; None: no limit.
        end_ids: Ids of the tokens with which the chat template ends a turn.
        end_texts: What ends a turn, but is several tokens of this tokenizer.

    Raises:
        UserError: The tokenizer has no chat template, but `chat` is true or there is a `system`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool | None = None,
        system: str | None = None,
    ) -> None:
        self._tokenizer, self._system = tokenizer, system
        self._vocab_size = vocabulary_size(model)
        self.context = context_length(model)
        is_chat = bool(tokenizer.chat_template) if chat is None else chat
        self._template = ChatTemplate(tokenizer) if is_chat else None
        if system is not None and not is_chat:
            raise UserError(
                "generate.system: is for chats, but the tokenizer has no chat template; name one, "
                "such as data.chat_template=chatml, or leave the system message out."
            )
        markers = end_markers(self._template) if self._template else ()
        ids = {marker: single_id(marker, tokenizer) for marker in markers}
        eos = tokenizer.eos_token_id
        self.end_ids = {id for id in (*ids.values(), eos) if isinstance(id, int)}
        self.end_texts = tuple(marker for marker, id in ids.items() if id is None)

    @property
    def is_chat(self) -> bool:
        """Whether a text is answered, and not continued."""
        return self._template is not None

    def messages(self, prompt: Prompt) -> list[Message]:
        """Return the messages of a prompt, with the system message."""
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        if self._system and not any(message["role"] == "system" for message in given):
            given.insert(0, {"role": "system", "content": self._system})
        return given

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; that of a chat ends with the header of an answer.

        Raises:
            UserError: The prompt is empty or too long, the template does not take the messages, or
                the model does not have one of its tokens.
        """
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise UserError("the prompt is empty; write at least one word.")
        if self._template:
            text = self._render(self._template, self.messages(prompt))
            _check_characters(text)
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        elif isinstance(prompt, str):
            _check_characters(prompt)
            ids = self._tokenizer(prompt, verbose=False)["input_ids"]
        else:
            raise UserError(
                "the messages of a chat need a chat template, and the tokenizer has none; set one, "
                "such as data.chat_template=chatml, or in Python tokenizer.chat_template, or write "
                "the prompt as text."
            )
        self._check(ids)
        return [*ids]

    def _render(self, template: ChatTemplate, messages: Sequence[Message]) -> str:
        try:
            return template.render(messages, add_generation_prompt=True)
        except RenderError as error:
            raise UserError(f"the chat template does not take the messages: {error}") from error

    def _check(self, ids: Sequence[int]) -> None:
        """Check that the model can read the tokens and has room for another one."""
        if not ids:
            raise UserError("the prompt has no tokens; write at least one word.")
        if max(ids) >= self._vocab_size:
            raise UserError(
                f"the prompt has the token {max(ids)}, but the model has {self._vocab_size:,} "
                "tokens; use the tokenizer of the model."
            )
        if self.context is not None and len(ids) >= self.context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, and the context of the model has "
                f"{self.context:,} for the prompt and the reply; shorten it."
            )


def _check_characters(text: str) -> None:
    """Refuse what no tokenizer takes: bytes that are not UTF-8, and halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt has {text[error.start]!a}, which is not a character; write it in UTF-8."
        ) from error


def context_length(model: nn.Module) -> int | None:
    """Return the largest number of tokens that `model` was made for; None if it does not say."""
    table = shortest_position_table(model)
    limits = (getattr(text_config(model), "max_position_embeddings", None), table and table[1])
    return min((limit for limit in limits if limit), default=None)
