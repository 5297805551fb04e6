"""Find the characters of a rendered chat that are trained, exactly or not at all.

A template only renders text: it does not say which part the assistant has written. A mask that is a
guess trains on the user's words, or never trains the token that ends a turn, and nobody notices. So
every span has a proof, of one of three kinds:

- marks: the template encloses what the assistant generates in `{% generation %}`;
- prefixes: the text before the turn with the generation prompt, and the text up to its end, both
  begin the whole text, so the turn is what lies between;
- context: some templates render a turn differently once others follow, as Qwen3 drops thinking.
  There the turn is what changes with the content of the message, back to the generation prompt and
  on to the token that ends a turn.

A turn for which all of them fail is refused by its number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hqqtrain.common.errors import UserError
from hqqtrain.data.chat.template import ChatTemplate, RenderError, Span
from hqqtrain.data.examples import Conversation, Message

LOSS_ON = ("assistant", "last", "completion", "all")

ASSISTANT = "assistant"

_PROBE = "\ue0b7probe\ue0b7"
"""A content in private-use characters, which no text of a data set begins or ends with."""

_USER_PROBE = "\ue0b8user\ue0b8"


class InexactError(UserError):
    """The trained part of a turn cannot be told exactly."""


def trained_spans(
    template: ChatTemplate, conversation: Conversation, loss_on: str
) -> tuple[str, list[Span]]:
    """Render a conversation and find what is trained.

    A span of a turn begins directly after the generation prompt, the header that an answer follows.
    It ends with the token that ends a turn, if the template has one, or where the next turn begins.

    Args:
        template: The chat template.
        conversation: The messages.
        loss_on: `assistant` (all turns of the assistant that the row does not exclude), `last` (the
            last of them), `completion` (those from `completion_start` on) or `all` (all text).

    Returns:
        The text, and the spans in order, which do not overlap.

    Raises:
        InexactError: A turn whose span cannot be told exactly, by its number from 1.
        RenderError: The template does not take the messages.
    """
    if loss_on == "all":
        text = template.render(conversation.messages, conversation.tools)
        return text, [(0, len(text))]
    turns = _wanted_turns(conversation, loss_on)
    if template.has_marks(conversation.tools):
        return _marked_spans(template, conversation, turns)
    text = template.render(conversation.messages, conversation.tools)
    if not turns:
        return text, []
    rendered = _Rendered(template, conversation, text, end_markers(template))
    spans = [rendered.span(turn) for turn in turns]
    _check_spans(template, conversation, text, dict(zip(turns, spans, strict=True)))
    return text, spans


def _wanted_turns(conversation: Conversation, loss_on: str) -> list[int]:
    """Return the indices of the messages that are trained."""
    first = conversation.completion_start or 0 if loss_on == "completion" else 0
    turns = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == ASSISTANT and index >= first
    ]
    if loss_on == "last":
        turns = turns[-1:]
    return [index for index in turns if index not in conversation.untrained]


@dataclass(frozen=True)
class _Rendered:
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
            raise _inexact(turn, f"the messages before it cannot be rendered: {error}") from error
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
            raise _inexact(turn, "later turns change it, and no header shows where it begins")
        start = self.text.rfind(header, 0, begin)
        if start < 0:
            raise _inexact(
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
        raise _inexact(turn, "later turns change it, and no token ends it")

    def _changed_by_content(self, turn: int) -> Span:
        """Return the part of the text that another content of the message would replace."""
        messages = list(self.conversation.messages)
        if (
            not isinstance(messages[turn].get("content"), str)
            or not messages[turn]["content"].strip()
        ):
            raise _inexact(turn, "later turns change it, and it has no content to find it by")
        messages[turn] = {**messages[turn], "content": _PROBE}
        try:
            other = self._render(messages)
        except RenderError as error:
            raise _inexact(turn, f"another content cannot be rendered: {error}") from error
        begin = _shared_length(self.text, other)
        tail = _shared_length(self.text[begin:][::-1], other[begin:][::-1])
        if other == self.text:
            raise _inexact(turn, "the chat template leaves out its content")
        if other[begin : len(other) - tail] != _PROBE:
            raise _inexact(turn, "its content changes other parts of the text, too")
        return begin, len(self.text) - tail

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        if not messages and not add_generation_prompt:
            return ""
        return self.template.render(
            messages, self.conversation.tools, add_generation_prompt=add_generation_prompt
        )


def _marked_spans(
    template: ChatTemplate, conversation: Conversation, turns: list[int]
) -> tuple[str, list[Span]]:
    """Return the text and the spans of its `{% generation %}` marks, for the wanted turns."""
    text, marks = template.render_with_marks(conversation.messages, conversation.tools)
    rendered = _Rendered(template, conversation, text, end_markers(template))
    marks_by_turn, spans = rendered.marks_by_turn(marks), []
    for turn in turns:
        parts = marks_by_turn[turn]
        check_is_rendered(
            conversation.messages[turn], turn, "".join(text[begin:end] for begin, end in parts)
        )
        begin_of_turn = rendered.end_of_prompt(turn)
        parts = _joined(
            [(max(begin, begin_of_turn), end) for begin, end in parts if end > begin_of_turn]
        )
        if parts:  # the mark may leave out the token that ends the turn
            parts[-1] = (parts[-1][0], rendered.end_of_turn(*parts[-1]))
        spans += parts
    return text, spans


@lru_cache(maxsize=16)
def end_markers(template: ChatTemplate) -> tuple[str, ...]:
    """Return the tokens that end a turn of the assistant: the last turn, and one before others."""
    user, answer = {"role": "user", "content": _USER_PROBE}, {"role": ASSISTANT, "content": _PROBE}
    return tuple(dict.fromkeys(_ends_of_probes(template, user, answer)))


def _ends_of_probes(template: ChatTemplate, user: Message, answer: Message) -> Iterator[str]:
    def render(*messages: Message, add_generation_prompt: bool = False) -> str:
        try:
            return template.render(messages, add_generation_prompt=add_generation_prompt)
        except RenderError:
            return ""

    if marker := template.first_special(render(user, answer).rpartition(_PROBE)[2].lstrip()):
        yield marker
    between = render(user, answer, user).rpartition(_PROBE)[2].partition(_USER_PROBE)[0].lstrip()
    marker = template.first_special(between)
    # If no token ends the answer, the first one begins the header of the next turn: it is its only
    # one, as in `[INST] `, or the header of the assistant begins with it, too.
    prompt, before = render(user, add_generation_prompt=True), render(user)
    header = prompt.removeprefix(before) if before else ""
    is_header = between == marker or not between.removeprefix(marker).strip()
    if marker and not is_header and marker != template.first_special(header):
        yield marker


def _check_spans(
    template: ChatTemplate, conversation: Conversation, text: str, spans: dict[int, Span]
) -> None:
    """Check that each span has what the assistant says in its turn, and nothing of the others."""
    messages, end_before = conversation.messages, 0
    others = [
        m if m["role"] == ASSISTANT or not isinstance(m.get("content"), str)
        else {**m, "content": _USER_PROBE}
        for m in messages
    ]  # fmt: skip
    try:
        elsewhere = template.render(others, conversation.tools)
    except RenderError:
        elsewhere = text
    for turn, (begin, end) in spans.items():
        if begin < end_before:
            raise _inexact(turn, "its part overlaps with that of an earlier turn")
        if text[begin:end] not in elsewhere:
            raise _inexact(turn, "its part has text of another message, such as a tool's result")
        check_is_rendered(messages[turn], turn, text[begin:end])
        end_before = end


def check_is_rendered(message: Message, turn: int, part: str) -> None:
    """Check that the template has rendered what a message of the assistant says.

    Thinking may be left out, as many templates do for all turns but the last.

    Args:
        message: The message.
        turn: Its index.
        part: Its part of the rendered chat.

    Raises:
        InexactError: The content, or a tool call, is not in it.
    """
    content = message.get("content")
    words = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    if words not in part:
        raise _inexact(turn, "the chat template leaves out its content")
    for call in message.get("tool_calls") or ():
        name = (call.get("function") or call).get("name")
        if isinstance(name, str) and name not in part:
            raise _inexact(turn, f"the chat template leaves out its call of the tool {name!r}")


def _joined(spans: list[Span]) -> list[Span]:
    """Return the spans, with those joined that follow each other directly."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def _shared_length(one: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _inexact(turn: int, reason: str) -> InexactError:
    return InexactError(
        f"message {turn + 1} (assistant): its part of the rendered chat cannot be told exactly: "
        f"{reason}."
    )
