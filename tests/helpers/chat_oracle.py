"""The spans to train on, read off a rendered text by the hand-written facts of its template.

The masks of the package come from the template's marks and from comparing renderings. This scan
does neither: it looks for the header that stands before the assistant's text and for the token
that ends it, in conversations whose texts contain no marker.
"""

from chat_facts import FACTS, Facts

Span = tuple[int, int]


def expected_spans(name: str, text: str) -> list[Span]:
    """Return the spans of all assistant turns with something to train, in order."""
    return [(start, end) for start, end in _turns(FACTS[name], text) if start < end]


def expected_text(name: str, text: str) -> str:
    """Return what is trained of a text, with EOS where a last turn has no end of its own."""
    facts, turns = FACTS[name], _turns(FACTS[name], text)
    is_open = turns[-1][1] == len(text) and not text.endswith(facts.ends or "\0")
    trained = [text[start:end] for start, end in turns]
    return "".join(trained) + facts.eos_token * is_open


def _turns(facts: Facts, text: str) -> list[Span]:
    """Return the spans of all assistant turns, those without any text too."""
    spans, at = [], 0
    while found := _first(facts.headers, text, at):
        header, after = found
        if text.startswith(facts.no_turn, after):
            at = after
            continue
        start = header if facts.trains_header else after
        if facts.opening and text.startswith(facts.opening, after):
            start = after + len(facts.opening)
        end = _end_of_turn(facts, text, start)
        if end is None:  # a header without a turn: the template always adds the prompt
            break
        at = max(end, after)
        spans.append((start, end))
    return spans


def reason_to_refuse(name: str, conversation: str, text: str) -> str | None:
    """Return why a conversation must be refused with a template; None where it must be exact."""
    facts = FACTS[name]
    for known in (conversation, "*"):
        if known in facts.refused:
            return facts.refused[known]
    if facts.opening and not facts.marks:
        starts = [start for start, _ in _turns(facts, text)]
        if not all(text.endswith(facts.opening, 0, start) for start in starts):
            return f"The prompt at inference ends with {facts.opening!r}, which a turn lacks."
    return None


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
