"""Find the part of one turn of the assistant in a rendered chat.

See `spans.py` for what makes it exact.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.data.chat.end_markers import ASSISTANT, PROBE, end_of_text
from hqqtrain.data.chat.template import ChatTemplate, RenderError, Span
from hqqtrain.data.examples import Conversation, Message


class InexactError(UserError):
    """The trained part of a turn cannot be told exactly."""


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation, in which the span of a turn is looked for."""

    template: ChatTemplate
    conversation: Conversation
    text: str
    end_markers: tuple[str, ...]

    def span(self, turn: int) -> Span:
        """Return the span of the message `turn`, by prefixes or else by context."""
        messages = self.conversation.messages
        try:
            prompt = self._render(messages[:turn], add_generation_prompt=True)
        except RenderError as error:
            raise inexact(turn, f"the messages before it cannot be rendered: {error}") from error
        try:
            whole = self._render(messages[: turn + 1])
        except RenderError:
            whole = ""
        is_prefix = self.text.startswith(prompt)
        if is_prefix and whole.startswith(prompt) and self.text.startswith(whole):
            return len(prompt), self.end_of_turn(len(prompt), len(whole))
        other = _with_other_words(self.conversation.messages[turn], turn)
        begin, end = self._changed_by(other, turn)
        start = len(prompt) if is_prefix else self._end_of_header(turn, prompt, begin)
        return start, self._end_after(turn, end, other)

    def end_of_turn(self, start: int, end: int) -> int:
        """Return the end of the token that ends the turn from `start` to `end`, if there is one.

        Whitespace and other tokens, such as one that ends the text, may follow that token. A
        template may also render it only if another turn follows.
        """
        for marker in self.end_markers:
            if self.text.startswith(marker, end):
                return end + len(marker)
            position = self.text.rfind(marker, start, end)
            if position >= 0:
                return self._end_of_markers(position + len(marker), end)
        return end

    def begin_of_answer(self, turn: int, mark: int) -> int:
        """Return where the answer begins in a turn that is marked from `mark` on.

        That is after the generation prompt, or what of it is marked. A turn that goes on otherwise
        than the prompt ends, as with an empty thought, begins at its mark.
        """
        try:
            prompt = self._render(self.conversation.messages[:turn], add_generation_prompt=True)
        except RenderError:
            return mark
        if self.text.startswith(prompt):
            return max(mark, len(prompt))
        header = self._header(turn, prompt)
        lengths = range(len(header), 0, -1)
        before = next((k for k in lengths if self.text.endswith(header[:k], 0, mark)), 0)
        if self.text.startswith(header[before:], mark):
            return mark + len(header) - before
        shared = 0 if before else _shared_length(header, self.text[mark:])
        return mark + self.template.end_of_last_special(header[:shared])

    def marks_by_turn(self, marks: list[Span]) -> dict[int, list[Span]]:
        """Return the marks of every message of the assistant."""
        messages = self.conversation.messages
        turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        if len(marks) == len(turns):
            return {turn: [mark] for turn, mark in zip(turns, marks, strict=True)}
        found: dict[int, list[Span]] = {turn: [] for turn in turns}
        # The conversation up to a turn begins as the whole one, at least up to the turn's marks.
        ends = [_shared_length(self._render(messages[: t + 1]), self.text) for t in turns[:-1]]
        for mark in marks:
            place = next((i for i, end in enumerate(ends) if mark[0] <= end), len(turns) - 1)
            found[turns[place]].append(mark)
        return found

    def _end_of_markers(self, start: int, end: int) -> int:
        """Return `start`, or `end` if words follow there that the template does not always add."""
        rest = self.text[start:end].strip()
        if rest == end_of_text(self.template).strip():
            return start
        while marker := self.template.first_special(rest):
            rest = rest[len(marker) :].strip()
        return end if rest else start

    def _header(self, turn: int, prompt: str) -> str:
        """Return what a generation prompt adds to the messages before a turn."""
        try:
            before = self._render(self.conversation.messages[:turn])
        except RenderError:
            before = prompt
        return prompt[len(before) :] if prompt.startswith(before) else ""

    def _end_of_header(self, turn: int, prompt: str, begin: int) -> int:
        """Return the end of the last generation prompt before `begin`."""
        # A template without one writes the header, as `[/INST]`, at the end of the message before.
        header = self._header(turn, prompt) or self.template.from_last_special(prompt)
        if not header:
            raise inexact(turn, "later turns change it, and no header shows where it begins")
        start = self.text.rfind(header, 0, begin)
        if start < 0:
            raise inexact(
                turn, f"a prompt would end with {header!r}, which is not before it in this chat"
            )
        return start + len(header)

    def _end_after(self, turn: int, words_end: int, other: Message) -> int:
        """Return the end of a turn whose own words end at `words_end`.

        The turn includes the tokens that follow its words if the conversation ends with it. Where
        they differ from those of the conversation, it ends with the first token that ends a turn.
        """
        before = self.conversation.messages[:turn]
        try:
            short = self._render([*before, self.conversation.messages[turn]])
            _, end = _difference(short, self._render([*before, other]))
        except RenderError:
            pass
        else:
            if self.text.startswith(short[end:], words_end):
                return self.end_of_turn(words_end, words_end + len(short) - end)
        positions = [(self.text.find(marker, words_end), marker) for marker in self.end_markers]
        ends = [position + len(marker) for position, marker in positions if position >= 0]
        if ends:
            return min(ends)
        if turn == len(self.conversation.messages) - 1:
            return len(self.text)
        raise inexact(turn, "later turns change it, and no token ends it")

    def _changed_by(self, other: Message, turn: int) -> Span:
        """Return the part of the text that another message `turn` would replace."""
        messages = list(self.conversation.messages)
        messages[turn] = other
        try:
            text = self._render(messages)
        except RenderError as error:
            raise inexact(turn, f"another content cannot be rendered: {error}") from error
        if text == self.text:
            raise inexact(turn, "the chat template leaves out its content")
        begin, end = _difference(self.text, text)
        replaced = text[begin : len(text) - (len(self.text) - end)]
        if other.get("content") == PROBE and replaced != PROBE:
            raise inexact(turn, "its content changes other parts of the text, too")
        return begin, end

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        if not messages and not add_generation_prompt:
            return ""
        return self.template.render(
            messages, self.conversation.tools, add_generation_prompt=add_generation_prompt
        )


def _with_other_words(message: Message, turn: int) -> Message:
    """Return a message with another content, or with other arguments if it only calls tools."""
    content, calls = message.get("content"), message.get("tool_calls")
    is_blank = content is None or (isinstance(content, str) and not content.strip())
    if calls and is_blank:
        return {**message, "tool_calls": [_with_other_arguments(call) for call in calls]}
    if not is_blank and not isinstance(content, str):
        raise inexact(turn, "later turns change it, and it has no content to find it by")
    return {**message, "content": PROBE}


def _with_other_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call of a tool with other arguments, of the same names and in the same form."""
    function = call.get("function") or call
    given: Any = function.get("arguments")
    is_text = isinstance(given, str)
    with suppress(ValueError):
        given = json.loads(given) if is_text else given
    other: Any = dict.fromkeys(given or ("probe",), PROBE) if isinstance(given, dict) else PROBE
    changed = {**function, "arguments": json.dumps(other) if is_text else other}
    return {**call, "function": changed} if "function" in call else changed


def _difference(text: str, other: str) -> Span:
    """Return the part of a text that differs from another text."""
    begin = _shared_length(text, other)
    return begin, len(text) - _shared_length(text[begin:][::-1], other[begin:][::-1])


def _shared_length(one: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def inexact(turn: int, reason: str) -> InexactError:
    """Return the error for a turn, which is counted from 0, with the reason in words."""
    return InexactError(
        f"message {turn + 1} (assistant): its part of the rendered chat cannot be told exactly: "
        f"{reason}."
    )
