"""The spans to train on, read off a rendered text by the hand-written facts of its template.

The masks of the package come from the template's marks and from comparing renderings. This scan
does neither: it looks for the header that stands before the assistant's text and for the token
that ends it, in conversations whose texts contain no marker.
"""

from chat_conversations import CONVERSATIONS
from chat_facts import FACTS, Facts

Span = tuple[int, int]


def expected_spans(name: str, conversation: str, text: str) -> list[Span]:
    """Return the spans of all assistant turns with something to train, in order."""
    messages, _ = CONVERSATIONS[conversation]
    results = [m["content"] for m in messages if m["role"] == "tool"]
    facts, spans, at = FACTS[name], [], 0
    while found := _first(facts.headers, text, at):
        header, after = found
        start = header if facts.trains_header else after
        if facts.opening and text.startswith(facts.opening, after):
            start = after + len(facts.opening)
        end = _end_of_turn(facts, text, start)
        if end is None:  # a header without a turn: the template always adds the prompt
            break
        at = max(end, after)
        # Some templates write the result of a tool below the assistant's header.
        if end > start and not any(word in text[start:end] for word in results):
            spans.append((start, end))
    return spans


def reason_to_refuse(name: str, conversation: str) -> str | None:
    """Return why a conversation must be refused with a template; None where it must be exact."""
    refused = FACTS[name].refused
    return refused.get(conversation) or refused.get("*")


def _end_of_turn(facts: Facts, text: str, start: int) -> int | None:
    """Return where the turn that starts here ends; None where the text has no end of it."""
    at = start
    while True:
        end, turn = _first(facts.ends, text, at), _first(facts.turns, text, at)
        if turn and (end is None or turn[0] < end[0]):
            return turn[0]
        if end is None:
            return len(text) if facts.open_end or not facts.ends else None
        at = end[1]
        if facts.goes_on is None or not text.startswith(facts.goes_on, at):
            return at


def _first(markers: tuple[str, ...], text: str, start: int) -> Span | None:
    """Return where the first of the markers stands at or after `start`; the longest of several."""
    places = [(text.find(marker, start), -len(marker)) for marker in markers]
    found = min((place for place in places if place[0] >= 0), default=None)
    return found and (found[0], found[0] - found[1])
