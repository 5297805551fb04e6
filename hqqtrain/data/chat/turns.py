"""Find the part of one turn of the assistant in a rendered chat.

See `spans.py` for what makes it exact.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hqqtrain.common.errors import UserError
from hqqtrain.data.chat.template import ChatTemplate, RenderError, Span
from hqqtrain.data.examples import Conversation, Message

ASSISTANT = "assistant"

PROBE = "\ue0b7probe\ue0b7"
"""A content in private-use characters, which no text of a data set begins or ends with."""

USER_PROBE = "\ue0b8user\ue0b8"


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
        begin, end = self._changed_by_content(turn)
        start = len(prompt) if is_prefix else self._end_of_header(turn, prompt, begin)
        return start, self._end_after(turn, end)

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

    def end_of_prompt(self, turn: int) -> int:
        """Return the end of what a prompt for this turn has in common with the text.

        Where both differ from some character on, it ends with the last special token before.
        """
        try:
            prompt = self._render(self.conversation.messages[:turn], add_generation_prompt=True)
        except RenderError:
            return 0
        shared = _shared_length(prompt, self.text)
        if shared == len(prompt):
            return shared
        return self.template.end_of_last_special(prompt[:shared])

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
        """Return the end of the tokens directly at `start`, or `end` if other text follows them."""
        while marker := self.template.first_special(self.text[start:end]):
            start += len(marker)
        rest = self.text[start:end].strip()
        return end if self.template.first_special(rest) != rest else start

    def _end_of_header(self, turn: int, prompt: str, begin: int) -> int:
        """Return the end of the last generation prompt before `begin`."""
        try:
            before = self._render(self.conversation.messages[:turn])
        except RenderError:
            before = prompt
        header = prompt[len(before) :] if prompt.startswith(before) else ""
        if not header:
            raise inexact(turn, "later turns change it, and no header shows where it begins")
        start = self.text.rfind(header, 0, begin)
        if start < 0:
            raise inexact(
                turn, f"a prompt would end with {header!r}, which is not before it in this chat"
            )
        return start + len(header)

    def _end_after(self, turn: int, content_end: int) -> int:
        """Return the end of the first token after the content that ends a turn."""
        positions = [(self.text.find(marker, content_end), marker) for marker in self.end_markers]
        ends = [position + len(marker) for position, marker in positions if position >= 0]
        if ends:
            return min(ends)
        if turn == len(self.conversation.messages) - 1:
            return len(self.text)
        raise inexact(turn, "later turns change it, and no token ends it")

    def _changed_by_content(self, turn: int) -> Span:
        """Return the part of the text that another content of the message would replace."""
        messages = list(self.conversation.messages)
        if (
            not isinstance(messages[turn].get("content"), str)
            or not messages[turn]["content"].strip()
        ):
            raise inexact(turn, "later turns change it, and it has no content to find it by")
        messages[turn] = {**messages[turn], "content": PROBE}
        try:
            other = self._render(messages)
        except RenderError as error:
            raise inexact(turn, f"another content cannot be rendered: {error}") from error
        begin = _shared_length(self.text, other)
        tail = _shared_length(self.text[begin:][::-1], other[begin:][::-1])
        if other == self.text:
            raise inexact(turn, "the chat template leaves out its content")
        if other[begin : len(other) - tail] != PROBE:
            raise inexact(turn, "its content changes other parts of the text, too")
        return begin, len(self.text) - tail

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        if not messages and not add_generation_prompt:
            return ""
        return self.template.render(
            messages, self.conversation.tools, add_generation_prompt=add_generation_prompt
        )


@lru_cache(maxsize=16)
def end_markers(template: ChatTemplate) -> tuple[str, ...]:
    """Return the tokens that end a turn of the assistant: the last turn, and one before others."""
    user, answer = {"role": "user", "content": USER_PROBE}, {"role": ASSISTANT, "content": PROBE}
    return tuple(dict.fromkeys(_ends_of_probes(template, user, answer)))


def _ends_of_probes(template: ChatTemplate, user: Message, answer: Message) -> Iterator[str]:
    def render(*messages: Message, add_generation_prompt: bool = False) -> str:
        try:
            return template.render(messages, add_generation_prompt=add_generation_prompt)
        except RenderError:
            return ""

    if marker := template.first_special(render(user, answer).rpartition(PROBE)[2].lstrip()):
        yield marker
    between = render(user, answer, user).rpartition(PROBE)[2].partition(USER_PROBE)[0].lstrip()
    marker = template.first_special(between)
    # If no token ends the answer, the first one begins the header of the next turn: it is its only
    # one, as in `[INST] `, or the header of the assistant begins with it, too.
    prompt, before = render(user, add_generation_prompt=True), render(user)
    header = prompt.removeprefix(before) if before else ""
    is_header = between == marker or not between.removeprefix(marker).strip()
    if marker and not is_header and marker != template.first_special(header):
        yield marker


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
