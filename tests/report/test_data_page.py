"""The page of data: the same as on the console, with all text escaped."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from data_views import CHAT, HOSTILE, METRICS
from parsed_html import Parsed

from hqqtrain.report.data_page import plot_lengths, render_data_page, write_data_page
from hqqtrain.report.data_view import DataSample, DataView, Piece

MARKUP = "</pre><script>alert('1')</script><img src=x onerror=alert(2)><!-- &amp; </mark>"


def _view(*pieces: Piece, title: str = "example 1 of 2", **keys) -> DataView:
    return DataView(METRICS, False, [DataSample(title, pieces, **keys)])


def test_the_page_has_the_figures_the_plot_and_the_samples():
    html = render_data_page(_view(*CHAT, hidden_tokens=5, last_pieces=CHAT[:2]), "mine-data")
    page = Parsed(html)
    assert page.open == []
    for words in (
        "mine-data", "mine.jsonl", "30.0 %", "left out: no assistant turn", "53.1 %", "10-14",
        "example 1 of 2", "... 5 tokens not shown ...", "min 10, median 12",
    ):  # fmt: skip
        assert words in page.text, words
    assert html.count("<svg ") == 1
    assert "<b>&lt;|user|&gt;</b>hi\nthere<b>" in html
    assert "<mark>hello<i>\u21b5</i>\n</mark><mark><b>&lt;|end|&gt;</b></mark>\n</pre>" in html


@pytest.mark.parametrize("is_trained", [False, True])
def test_html_in_the_text_stays_text(is_trained):
    metrics = replace(METRICS, source=MARKUP, format=MARKUP, left_out={MARKUP: 1})
    sample = DataSample(MARKUP, [Piece(MARKUP + HOSTILE, is_trained, is_special=True)])
    html = render_data_page(DataView(metrics, False, [sample]), MARKUP)
    page = Parsed(html)
    assert page.open == []
    assert not {"script", "img", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(MARKUP) >= 6
    assert "\\x1b[2J" in page.text
    html.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", html)


def test_plain_text_is_not_marked():
    view = replace(_view(Piece("a"), Piece("b", is_trained=True)), is_plain_text=True)
    html = render_data_page(view, "x")
    assert "so none is marked" in html
    assert "<mark>" not in html
    assert "<pre>\nab</pre>" in html


def test_without_samples_there_is_no_section_of_them():
    assert "<pre>" not in render_data_page(DataView(METRICS, False, []), "x")


def test_the_page_fits_dark_screens_and_phones():
    html = render_data_page(_view(*CHAT), "x")
    assert "prefers-color-scheme: dark" in html
    assert html.count("--mark:") == 2
    assert 'name="viewport"' in html
    assert not re.search(r"<svg [^>]*\bwidth=", html)


def test_a_long_leading_line_ending_is_kept():
    """A browser drops the first line ending of a <pre>."""
    assert "<pre>\n\n\nx</pre>" in render_data_page(_view(Piece("\n\nx")), "x")


def test_the_page_replaces_an_earlier_one(tmp_path: Path):
    for title in ("first", "second"):
        path = write_data_page(tmp_path, _view(*CHAT), title)
    assert path == tmp_path / "report" / "data.html"
    assert "second" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["data.html"]


def test_the_plot_has_a_bar_for_each_range():
    (axes,) = plot_lengths([("1-2", 5), ("3-4", 0), ("5-6", 2)]).axes
    assert [bar.get_width() for bar in axes.patches] == [5, 0, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1-2", "3-4", "5-6"]
