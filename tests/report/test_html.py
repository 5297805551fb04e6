"""Building blocks of a page: all text is escaped, and the markup is balanced."""

import pytest
from parsed_html import Parsed

from hqqtrain.report.html import (
    Link,
    render_details,
    render_page,
    render_plots,
    render_section,
    render_state,
    render_table,
    render_tables,
    render_tiles,
    render_wide_table,
)

HOSTILE = "</td><script>alert('1')</script>\"&é\n"


def test_a_page_escapes_its_title_and_keeps_its_body():
    page = Parsed(render_page(HOSTILE, HOSTILE, ["<b>x</b>", "<i>y</i>"]), ("img", "meta"))
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("b") == page.tags.count("i") == 1
    assert page.text.count("alert") == 3  # title, heading, subtitle


@pytest.mark.parametrize(
    "html",
    [
        render_table([HOSTILE], [[HOSTILE]]),
        render_wide_table([HOSTILE], [[Link(HOSTILE, HOSTILE)]]),
        render_tiles({HOSTILE: HOSTILE}),
        render_tables({HOSTILE: [(HOSTILE, HOSTILE)]}),
        render_plots({HOSTILE: "<svg></svg>"}),
        render_section(HOSTILE, ""),
        render_details(HOSTILE, ""),
        render_state(HOSTILE, HOSTILE, HOSTILE),
    ],
)
def test_text_is_escaped_everywhere(html):
    parsed = Parsed(html, ("img", "meta"))
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert HOSTILE in parsed.text
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]


def test_a_link_stays_in_the_folder_of_the_page():
    html = render_table([""], [[Link("x", 'javascript:alert(1)/../a b"onclick=1')]])
    ((_, path),) = Parsed(html, ("img", "meta")).attributes
    assert path == "javascript%3Aalert%281%29/../a%20b%22onclick%3D1"


def test_characters_that_no_file_can_hold_are_replaced():
    page = render_page("a\x00b\ud800\x1b[31m", "\uffff", [])
    assert page.encode().count("\N{REPLACEMENT CHARACTER}".encode()) == 2 * 3 + 1
    assert "\x00" not in page


def test_only_a_page_that_changes_is_loaded_again():
    assert "refresh" not in render_page("x", "y", [])
    assert '<meta http-equiv="refresh" content="60">' in render_page(
        "x", "", [], refresh_seconds=60
    )


def test_a_header_row_without_text_is_omitted():
    assert "<th>" not in render_table(("", ""), [("a", "1")])
    parsed = Parsed(render_table(("name", ""), [("a", "1"), ("b", "2")]))
    assert parsed.tags.count("th") == 2
    assert parsed.tags.count("tr") == 3
    assert parsed.text == "namea1b2"


def test_no_style_has_a_fixed_width_that_a_phone_lacks():
    """No grid column is wider than the page, and wide tables scroll by themselves."""
    page = render_page("x", "y", [render_wide_table(["a"] * 30, [["1"] * 30])])
    assert page.count("minmax(min(100%,") == 3
    assert '<div class="scroll"><table>' in page
