"""Building blocks of a page: all text is escaped, images are embedded, the markup is balanced."""

import base64
from html.parser import HTMLParser

import pytest

from hqqtrain.report.html import (
    format_number,
    render_image,
    render_images,
    render_page,
    render_table,
    render_tiles,
)

HOSTILE = "</td><script>alert('1')</script>\"&é\n"


class Parsed(HTMLParser):
    """The tags, attributes and text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_escapes_its_title_and_keeps_its_body():
    page = Parsed(render_page(HOSTILE, HOSTILE, ["<b>x</b>", "<i>y</i>"]))
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("b") == page.tags.count("i") == 1
    assert page.text.count("alert") == 3  # title, heading, subtitle


def test_cells_labels_and_headings_are_escaped(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    for html in (
        render_table([HOSTILE], [[HOSTILE]]),
        render_tiles({HOSTILE: HOSTILE}),
        render_image(HOSTILE, tmp_path / "a.png"),
    ):
        parsed = Parsed(html)
        assert parsed.open == []
        assert "script" not in parsed.tags
        assert HOSTILE in parsed.text or HOSTILE in dict(parsed.attributes).values()


def test_a_header_row_without_text_is_omitted():
    assert "<th>" not in render_table(("", ""), [("a", "1")])
    parsed = Parsed(render_table(("name", ""), [("a", "1"), ("b", "2")]))
    assert parsed.tags.count("th") == 2
    assert parsed.tags.count("tr") == 3
    assert parsed.text == "namea1b2"


def test_images_are_embedded_byte_for_byte(tmp_path):
    content = bytes(range(256))
    (tmp_path / "a.png").write_bytes(content)
    parsed = Parsed(render_images({"One": tmp_path / "a.png", "Two": tmp_path / "a.png"}))
    sources = [value for name, value in parsed.attributes if name == "src"]
    assert len(sources) == 2
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) == content
    assert Parsed(render_images({})).tags == ["div"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"), (0, "0"), (-5, "-5"), (0.123456, "0.1235"), (12345.6, "1.235e+04"),
        (float("nan"), "nan"), (True, "True"), (None, "None"), ("1234", "1234"),
    ],
)  # fmt: skip
def test_numbers_are_formatted_for_people(value, text):
    assert format_number(value) == text
