"""Render conversations with the chat template of a tokenizer, in the sandbox of transformers.

A template comes with a model, so it is foreign code. The sandbox gives it neither attributes of
Python nor files, and bounds its loops.
"""

import itertools
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from hqqtrain.common.errors import UserError
from hqqtrain.data.examples import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""The first character and the end of a part of a text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\ue0b7probe\ue0b7"
_MARKER = re.compile(r"<[|\uff5c/]?[^<>\s]{1,40}[|\uff5c]?>|\[/?[A-Z_]{2,40}\]")


_FUNCTION = {"name": "probe", "arguments": {"probe": _PROBE}}
_CALL_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "probe"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": _FUNCTION}]},
)
_TOOL_PROBE = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string"}}},
    },
}
_JSON_ARGUMENTS = re.compile(rf'\{{\s*"probe"\s*:\s*"{_PROBE}"\s*\}}')
_PYTHON_ARGUMENTS = f"'probe': '{_PROBE}'"


class CallForm(NamedTuple):
    """How a template reads the calls of tools in a message.

    Attributes:
        is_text: Whether the arguments are JSON text, and not an object.
        needs_null: Whether the content beside calls is null, and not missing.
    """

    is_text: bool
    needs_null: bool

    def is_shown(self, text: str) -> bool:
        """Whether the arguments of the probe are in a rendered text, and not as Python's dict."""
        if self.is_text:
            return bool(_JSON_ARGUMENTS.search(text))
        return _PROBE in text and _PYTHON_ARGUMENTS not in text


_CALL_FORMS = tuple(CallForm(*form) for form in itertools.product((False, True), repeat=2))
"""The forms in the order in which they are tried. DeepSeek V3 joins text, and asks for null."""


class RenderError(ValueError):
    """A template does not take these messages."""


class ChatTemplate:
    """A chat template and the special tokens that it names.

    Args:
        tokenizer: The tokenizer, whose own template is used by default.
        source: Another template, as Jinja text.

    Raises:
        UserError: The tokenizer has no template, and none is given.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", source: str | None = None) -> None:
        self._tokenizer, self._source = tokenizer, source
        if source is None and not tokenizer.chat_template:
            raise UserError(
                "data.chat_template=auto: the tokenizer of the model has no chat template, as most "
                "base models; name one, such as data.chat_template=chatml."
            )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: The messages.
            tools: The JSON schemas of functions.
            add_generation_prompt: Whether to add the header that an answer follows.

        Raises:
            RenderError: The template refuses the messages, or fails on them.
        """
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_with_marks(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and what its `{% generation %}` marks enclose."""
        text, marks = self._render(messages, tools, marks=True)
        return text, [span for span in marks if span[0] < span[1]]

    def has_marks(self, tools: Sequence[dict[str, Any]] | None = None) -> bool:
        """Whether the template marks what the assistant generates."""
        return bool(_GENERATION.search(self._jinja(tools)))

    def first_special(self, text: str) -> str:
        """Return the special token at the beginning of a text, or an empty string."""
        known = (token for token in self._special_tokens if text.startswith(token))
        match = _MARKER.match(text)
        return max(known, key=len, default="") or (match.group() if match else "")

    def end_of_last_special(self, text: str) -> int:
        """Return the end of the last special token in a text; 0 if it has none."""
        ends = [text.rfind(token) + len(token) for token in self._special_tokens if token in text]
        return max([0, *ends, *(match.end() for match in _MARKER.finditer(text))])

    def from_last_special(self, text: str) -> str:
        """Return a text from its last special token on; an empty string if it has none."""
        starts = [text.rfind(token) for token in self._special_tokens if token in text]
        start = max([-1, *starts, *(match.start() for match in _MARKER.finditer(text))])
        return text[start:] if start >= 0 else ""

    @cached_property
    def _special_tokens(self) -> frozenset[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        named = self._tokenizer.all_special_tokens
        return frozenset({*named, *(token.content for token in added if token.special)} - {""})

    def _jinja(self, tools: Sequence[dict[str, Any]] | None) -> str:
        return self._source or self._tokenizer.get_chat_template(
            None, list(tools) if tools else None
        )

    def _as_template_reads(self, message: Message) -> Message:
        """Return a message without its nulls, and with content in parts for a multimodal template.

        Such a template loops over the parts of a content, and would leave out a string.
        """
        given = {key: value for key, value in message.items() if value is not None}
        if calls := given.get("tool_calls"):
            form = self._call_form
            if form.is_text:
                given["tool_calls"] = [_with_text_arguments(call) for call in calls]
            if form.needs_null and not given.get("content"):
                given["content"] = None
        if self._needs_parts and isinstance(given.get("content"), str):
            given["content"] = [{"type": "text", "text": given["content"]}]
        return given

    @cached_property
    def _call_form(self) -> "CallForm":
        """The first form of calls that the template renders with their arguments."""
        for form in _CALL_FORMS:
            self.__dict__["_call_form"] = form  # `render` reads it
            with suppress(RenderError):
                if form.is_shown(self.render(_CALL_PROBE, [_TOOL_PROBE])):
                    return form
        return _CALL_FORMS[0]

    @cached_property
    def _needs_parts(self) -> bool:
        """Whether the template leaves out a content that is a string, but not one in parts."""
        self.__dict__["_needs_parts"] = False  # `render` reads it
        as_text = self._renders_probe(_PROBE)
        return not as_text and self._renders_probe([{"type": "text", "text": _PROBE}])

    def _renders_probe(self, content: Any) -> bool:
        try:
            return _PROBE in self.render([{"role": "user", "content": content}])
        except RenderError:
            return False

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        special_tokens: dict[str, Any] = self._tokenizer.special_tokens_map
        given = [self._as_template_reads(message) for message in messages]
        try:
            rendered: Any = render_jinja_template(
                [given],
                tools=list(tools) if tools else None,
                chat_template=self._jinja(tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except jinja2.TemplateError as error:
            raise RenderError(str(error)) from error
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise RenderError(f"{type(error).__name__}: {error}") from error
        (text,), spans = rendered
        return text, [(begin, end) for begin, end in spans[0]] if marks else []


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call of a tool with its arguments as JSON text."""
    function = call.get("function", call)
    if isinstance(function.get("arguments"), str):
        return call
    text = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    changed = {**function, "arguments": text}
    return {**call, "function": changed} if "function" in call else changed
