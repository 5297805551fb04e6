"""Find the characters of a rendered chat that are trained, exactly or not at all.

A template only renders text: it does not say which part the assistant has written. A mask that is a
guess trains on the user's words, or never trains the token that ends a turn, and nobody notices. So
every span has a proof, of one of three kinds:

- marks: the template encloses what the assistant generates in `{% generation %}`;
- prefixes: the text before the turn with the generation prompt, and the text up to its end, both
  begin the whole text, so the turn is what lies between;
- context: some templates render a turn differently once others follow, as Qwen3 drops thinking.
  There the turn is what changes with the content of the message, or with the arguments of its
  calls, back to the generation prompt and on to the token that ends a turn.

A turn for which all of them fail is refused by its number.
"""

from hqqtrain.data.chat.end_markers import ASSISTANT, USER_PROBE, end_markers
from hqqtrain.data.chat.template import ChatTemplate, RenderError, Span
from hqqtrain.data.chat.turns import RenderedChat, inexact
from hqqtrain.data.examples import Conversation, Message


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
    rendered = RenderedChat(template, conversation, text, end_markers(template))
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


def _marked_spans(
    template: ChatTemplate, conversation: Conversation, turns: list[int]
) -> tuple[str, list[Span]]:
    """Return the text and the spans of its `{% generation %}` marks, for the wanted turns."""
    text, marks = template.render_with_marks(conversation.messages, conversation.tools)
    rendered = RenderedChat(template, conversation, text, end_markers(template))
    marks_by_turn, spans = rendered.marks_by_turn(marks), []
    for turn in turns:
        parts = marks_by_turn[turn]
        check_is_rendered(
            conversation.messages[turn], turn, "".join(text[begin:end] for begin, end in parts)
        )
        start = rendered.begin_of_answer(turn, parts[0][0]) if parts else 0
        parts = _joined([(max(begin, start), end) for begin, end in parts if end > start])
        if parts:  # the mark may leave out the token that ends the turn
            parts[-1] = (parts[-1][0], rendered.end_of_turn(*parts[-1]))
        spans += parts
    return text, spans


def _check_spans(
    template: ChatTemplate, conversation: Conversation, text: str, spans: dict[int, Span]
) -> None:
    """Check that each span has what the assistant says in its turn, and nothing of the others."""
    messages, end_before = conversation.messages, 0
    others = [
        m if m["role"] == ASSISTANT or not isinstance(m.get("content"), str)
        else {**m, "content": USER_PROBE}
        for m in messages
    ]  # fmt: skip
    try:
        elsewhere = template.render(others, conversation.tools)
    except RenderError:
        elsewhere = text
    for turn, (begin, end) in spans.items():
        if begin < end_before:
            raise inexact(turn, "its part overlaps with that of an earlier turn")
        if text[begin:end] not in elsewhere:
            raise inexact(turn, "its part has text of another message, such as a tool's result")
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
    words = content.rpartition("</think>")[2] if isinstance(content, str) else ""
    if "".join(words.split()) not in "".join(part.split()):
        raise inexact(turn, "the chat template leaves out its content")
    for call in message.get("tool_calls") or ():
        name = (call.get("function") or call).get("name")
        if isinstance(name, str) and name not in part:
            raise inexact(turn, f"the chat template leaves out its call of the tool {name!r}")


def _joined(spans: list[Span]) -> list[Span]:
    """Return the spans, with those joined that follow each other directly."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
