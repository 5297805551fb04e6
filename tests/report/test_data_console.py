"""The view of data on a console: trained tokens are told from others, and a sample does no harm."""

import random
import re
import unicodedata
from dataclasses import replace

import pytest
from data_views import CHAT, HOSTILE, METRICS

from hqqtrain.report.data_console import choose_marks, render_data
from hqqtrain.report.data_view import DataSample, DataView, Piece, percent
from hqqtrain.report.text import escape_controls


def _view(*pieces: Piece, **keys) -> DataView:
    sample = DataSample("example 1 of 2: 9 tokens, 3 trained", pieces, **keys)
    return DataView(METRICS, False, [sample])


def test_the_figures_are_named_and_every_line_has_one():
    text = render_data(_view(*CHAT), color=False)
    for name, value in {
        "source": "mine.jsonl", "format": "chat", "examples": "2", "exact duplicates": "1 (50.0 %)",
        "truncated examples": "1 (50.0 %)", "examples without a trained token": "0 (0 %)",
        "trained tokens": "9 (30.0 %)", "sequences": "1 of at most 64 tokens",
        "padding of full-length sequences": "53.1 %",
        "tokens per example": "min 10, median 12, p95 20, max 20",
        "left out: no assistant turn": "4",
    }.items():  # fmt: skip
        assert re.search(f"^{re.escape(name)} +{re.escape(value)}$", text, re.MULTILINE), name
    assert "  10-14 | ############## 1\n  15-20 | " + "#" * 40 + " 3\n" in text


def test_without_color_marks_enclose_what_is_trained():
    text = render_data(_view(*CHAT), color=False)
    assert "Tokens between [[ and ]] are trained" in text
    assert text.endswith(
        "example 1 of 2: 9 tokens, 3 trained\n"
        "  | <|user|>hi\n  | there<|bot|>[[ hello\n  | <|end|> ]]\n  | \n"
    )
    assert "\033" not in text


def test_with_color_every_line_sets_and_resets_it():
    text = render_data(_view(*CHAT), color=True)
    assert "  | \033[1m<|user|>\033[0mhi\n" in text
    assert "\033[1m<|bot|>\033[0m\033[32mhello\u21b5\033[0m\n" in text
    assert "  | \033[32m\033[1m<|end|>\033[0m\n  | \n" in text
    assert "[[" not in text
    for line in text.splitlines():
        assert line.count("\033[0m") == 0 or line.rindex("\033") == line.rindex("\033[0m")
        assert ("\033[32m" in line) <= ("\033[0m" in line)
    assert "\u21b5" not in render_data(_view(*CHAT), color=True, can_show_unicode=False)


def test_plain_text_is_not_marked():
    view = replace(_view(Piece("a"), Piece("b\n", is_trained=True)), is_plain_text=True)
    for color in (False, True):
        text = render_data(view, color=color)
        assert "so none is marked." in text
        assert "  | ab\n" in text
        assert "\033" not in text


def test_hidden_tokens_are_counted_between_the_two_parts():
    text = render_data(_view(*CHAT[:2], hidden_tokens=1234, last_pieces=CHAT[3:4]), color=False)
    assert "  | there\n... 1,234 tokens not shown ...\n  | [[ hello\n  |  ]]\n" in text


def test_without_samples_no_mark_is_explained():
    text = render_data(DataView(METRICS, False, []), color=False)
    assert text.endswith(" 3\n")
    assert "trained;" not in text


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_sample_cannot_move_the_cursor_set_a_color_or_pass_for_our_lines(color, is_trained):
    clean = render_data(_view(Piece("x", is_trained)), color=color)
    text = render_data(_view(Piece(HOSTILE, is_trained)), color=color)
    ours = {"\033[32m", "\033[1m", "\033[0m"}
    assert set(re.findall(r"\033[^m]*m", text)) <= ours
    plain = re.sub(r"\033\[\d+m", "", text)
    assert not [c for c in plain if c != "\n" and (ord(c) < 32 or 0x7F <= ord(c) < 0xA0)]
    assert not re.search("[\u2028\u202e\u2066\ufeff\ud800\U000e0041]", plain)
    head = len(clean.splitlines()) - 1
    assert all(line.startswith("  | ") for line in plain.split("\n")[head:-1])
    plain.encode()  # no half of a surrogate pair


def test_marks_are_longer_where_the_text_has_them():
    assert choose_marks(["a[[b]]c", "x[1]"]) == ("[[ ", " ]]")
    assert choose_marks(["if [[ -f x ]]; then"]) == ("[[[ ", " ]]]")
    assert choose_marks(["a [[[ b", " ]]]]"]) == ("[[[[[ ", " ]]]]]")


@pytest.mark.parametrize("seed", range(200))
def test_the_marked_text_can_be_read_back(seed):
    """A reader who knows the marks finds the same runs and the same characters."""
    draw = random.Random(seed)
    pieces = [
        Piece("".join(draw.choices("[] \\xa\x1b\n", k=draw.randint(1, 6))), draw.random() < 0.5)
        for _ in range(draw.randint(1, 5))
    ]
    text = render_data(_view(*pieces), color=False)
    begin, end = re.search(r"between (\[+) and (\]+) are", text).groups()
    body = "\n".join(line[4:] for line in text[:-1].split("\n") if line.startswith("  | "))
    found, is_trained = [], False
    while body:
        mark = f" {end}" if is_trained else f"{begin} "
        run, _, body = body.partition(mark)
        found += [(_unescape(run), is_trained)] if run else []
        is_trained = not is_trained
    runs: list[tuple[str, bool]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece.is_trained:
            runs[-1] = (runs[-1][0] + piece.text, piece.is_trained)
        else:
            runs.append((piece.text, piece.is_trained))
    assert found == runs


def _unescape(text: str) -> str:
    return re.sub(
        r"\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})",
        lambda m: "\\" if m[1] == "\\" else chr(int(m[1][1:], 16)), text,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(200))
def test_escaped_text_stands_for_one_text(seed):
    draw = random.Random(seed)
    text = "".join(draw.choices("\\xuU1bn\x1b\n\t\u202e\U000e0001\ud800é", k=draw.randint(0, 12)))
    assert _unescape(escape_controls(text)) == text


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("columns", [1, 24, 33, 80])
def test_a_long_line_is_wrapped_with_its_margin_and_its_colors(color, columns):
    """A terminal would begin the rest of a line without a margin, where it could pass for ours."""
    text = "x" * 76 + "example 2 of 2: " + "中文" * 40 + "e\u0301" * 50 + "\tb" * 9
    pieces = (Piece("a" * 30), Piece(text, is_trained=True), Piece("b" * 90, is_special=True))
    shown = render_data(_view(*pieces), color=color, columns=columns)
    lines = shown.split("example 1 of 2: 9 tokens, 3 trained\n")[1].splitlines()
    plain = [re.sub(r"\033\[\d+m", "", line) for line in lines]
    assert [line[:4] for line in plain] == ["  | ", *["  : "] * (len(lines) - 1)]
    body = "".join(line[4:] for line in plain)
    assert body == "a" * 30 + (text if color else f"[[ {text} ]]") + "b" * 90
    for line in plain:
        wide = sum(unicodedata.east_asian_width(c) == "W" for c in line)
        thin = sum(unicodedata.category(c) == "Mn" for c in line)
        assert len(line) + wide - thin + 7 * line.count("\t") <= max(columns, 24)
    if color:
        for line in lines:
            assert line.count("\033[0m") == 0 or line.endswith("\033[0m")
            assert "\033[32m" in line or "\033[1m" in line or set(line[4:]) <= {"a"}


def test_ordinary_text_is_not_escaped():
    text = 'print("a\\n\\d")\tünï 中文 \U0001f469\u200d\U0001f680 \u0645\u06cc\u200c\u0634'
    assert escape_controls(text) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (1e-9, "<0.1 %"), (0.99999, ">99.9 %"), (0.5, "50.0 %"),
     (0.0005, "0.1 %"), (0.9994, "99.9 %")],
)  # fmt: skip
def test_a_percentage_is_0_or_100_only_if_all_agree(share, text):
    assert percent(share) == text
