"""Find the tokens with which a chat template ends a turn of the assistant.

No template says which tokens these are. They show in the text of short chats, whose contents are
probes that can be found in it.
"""

from contextlib import suppress
from functools import lru_cache

from hqqtrain.data.chat.template import ChatTemplate, RenderError
from hqqtrain.data.examples import Message

ASSISTANT = "assistant"

PROBE = "\ue0b7probe\ue0b7"
"""A content in private-use characters, which no text of a data set begins or ends with."""

USER_PROBE = "\ue0b8user\ue0b8"

_USER: Message = {"role": "user", "content": USER_PROBE}
_ANSWER: Message = {"role": ASSISTANT, "content": PROBE}
_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}


@lru_cache(maxsize=16)
def end_markers(template: ChatTemplate) -> tuple[str, ...]:
    """Return what ends a turn of the assistant: the last turn, and one that others follow.

    A template may end both alike (ChatML), only the last (EOS of Mistral's), only the others, or
    none. It then returns one text, one, one or none; it returns two texts if it ends them
    differently.
    """
    last, rest = _leading_specials(template, _text_after_answer(template))
    between = _text_after_answer(template, _USER).partition(USER_PROBE)[0].lstrip()
    following, _ = _leading_specials(template, between)
    shared = [one for one, other in zip(last, following, strict=False) if one == other]
    if shared and last[0] == following[0]:
        # A template that always adds a prompt begins its header with the second token.
        return ("".join(shared[:1] if rest else shared),)
    marker = template.first_special(between)
    if not marker or _begins_header(template, marker, between):
        return tuple(last[:1])
    return (*last[:1], marker)


@lru_cache(maxsize=16)
def end_of_text(template: ChatTemplate) -> str:
    """Return what a template adds after the token that ends the last turn, such as a prompt."""
    after = _text_after_answer(template).lstrip()
    return next((after[len(m) :] for m in end_markers(template) if after.startswith(m)), "")


def _begins_header(template: ChatTemplate, marker: str, between: str) -> bool:
    """Whether a token after an answer is the first of the next turn's header, and ends no turn.

    Args:
        template: The chat template.
        marker: The token.
        between: The text between an answer and the words of the user that follow it.
    """
    before = render_probes(template, _USER)
    prompt = render_probes(template, _USER, add_generation_prompt=True)
    if before and marker == template.first_special(prompt.removeprefix(before)):
        return True  # it begins the header of the assistant, too
    if not between.removeprefix(marker).strip():
        return True  # it is all of the header, as `[INST] `
    following, header = _leading_specials(template, between)
    is_earlier = marker in before.partition(USER_PROBE)[0]  # no turn has ended there
    return is_earlier and len(following) == 1 and not template.from_last_special(header)


def _text_after_answer(template: ChatTemplate, *messages: Message) -> str:
    """Return what follows the words of an answer, which `messages` follow."""
    return render_probes(template, _USER, _ANSWER, *messages).rpartition(PROBE)[2]


def render_probes(
    template: ChatTemplate, *messages: Message, add_generation_prompt: bool = False
) -> str:
    """Return the text of a short chat; some templates need a system message, or tools, for it."""
    system = {"role": "system", "content": "probe"}
    for tools in (None, [_TOOL]):
        for chat in (messages, (system, *messages)):
            with suppress(RenderError):
                return template.render(chat, tools, add_generation_prompt=add_generation_prompt)
    return ""


def _leading_specials(template: ChatTemplate, text: str) -> tuple[list[str], str]:
    """Return the special tokens with which a text begins, and the rest of it."""
    rest, found = text.strip(), []
    while marker := template.first_special(rest):
        found.append(marker)
        rest = rest[len(marker) :]
    return found, rest.strip()
