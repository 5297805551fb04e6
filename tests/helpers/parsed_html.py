"""Reads HTML, to tell its tags from its text."""

from html.parser import HTMLParser


class Parsed(HTMLParser):
    """The tags, attributes and text of some HTML, in which every tag but `void` ones is closed."""

    def __init__(self, html: str, void: tuple[str, ...] = ("meta",)) -> None:
        super().__init__()
        self.void = void
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
