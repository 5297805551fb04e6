"""Overlap of held-out and training text: edited copies and pieces are found, boilerplate is not."""

import random
import re
import unicodedata

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.data.overlap import check_overlap, measure_overlap

RANDOM = random.Random(0)


def prose(words: int) -> str:
    """Return sentences of random words, in paragraphs of 80 words."""
    made = ["".join(RANDOM.choices("aeiounrstlmd", k=RANDOM.randint(2, 9))) for _ in range(words)]
    paragraphs = [made[start : start + 80] for start in range(0, words, 80)]
    return "\n\n".join(" ".join(paragraph).capitalize() + "." for paragraph in paragraphs)


DOCUMENTS = [prose(400) for _ in range(20)]
FRESH = [prose(400) for _ in range(20)]
LICENSE = prose(170)


def share(train: list[str], held_out: list[str]) -> float:
    return measure_overlap(train, held_out).share


def one_word_changed(text: str) -> str:
    words = text.split(" ")
    return " ".join([*words[: len(words) // 2], "otherwise", *words[len(words) // 2 + 1 :]])


EDITS = {
    "space at the end": lambda text: text + " ",
    "upper case": str.upper,
    "one word": one_word_changed,
    "every 20th word": lambda text: re.sub(r"((?:\S+\s+){19})\S+", r"\1other", text),
    "other line ends": lambda text: text.replace("\n", "\r\n"),
    "no punctuation": lambda text: re.sub(r"[.\n]", " ", text),
    "Markdown": lambda text: "# Title\n\n" + text.replace(".", " *!*"),
    "first half": lambda text: text[: len(text) // 2],
    "more text around": lambda text: f"{FRESH[0][:900]}\n{text}\n{FRESH[1][:900]}",
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_copy_is_found(edit):
    copy = edit(DOCUMENTS[3])
    copied = min(len(copy), len(DOCUMENTS[3]))
    assert share(DOCUMENTS, [copy, *FRESH]) == pytest.approx(
        copied / sum(map(len, [copy, *FRESH])), rel=0.03
    )
    assert share([copy, *FRESH], [DOCUMENTS[3]]) > 0.4
    assert share([*DOCUMENTS[:3], *DOCUMENTS[4:]], [copy, *FRESH[2:]]) == 0


def test_pieces_of_a_document_are_found_and_documents_of_pieces():
    paragraphs = [piece for document in DOCUMENTS for piece in document.split("\n\n")]
    lines = [" ".join(piece) for document in DOCUMENTS for piece in _groups(document.split(), 5)]
    one = "\n".join(DOCUMENTS)
    for train in (DOCUMENTS, paragraphs, lines, [one]):
        for held_out in (DOCUMENTS, paragraphs, lines, [one]):
            assert share(train, held_out) == pytest.approx(1, abs=0.01)
        assert share(train, FRESH) == share(FRESH, train) == 0
    shuffled = RANDOM.sample(paragraphs, len(paragraphs))
    assert share(shuffled, [one]) == share([one], shuffled) == 1


def _groups(words: list[str], size: int) -> list[list[str]]:
    return [words[start : start + size] for start in range(0, len(words), size)]


@pytest.mark.parametrize("words", [300, 400])
@pytest.mark.parametrize("before", [0, 100, 300, 333, 511, 800, 5000])
def test_a_shared_part_of_a_long_text_counts_by_its_length(words, before):
    fresh = " ".join(FRESH).split()
    copy = DOCUMENTS[0].split()[:words]
    long = " ".join([*fresh[:before], *copy, *fresh[before:]])
    assert share(DOCUMENTS, [long]) == pytest.approx(words / (words + len(fresh)), abs=0.002)
    assert share([" ".join(copy)], [long]) == pytest.approx(words / (words + len(fresh)), abs=0.002)


def test_the_example_shows_what_is_shared():
    long = f"{FRESH[1]}\n{FRESH[2]}\n{DOCUMENTS[7].upper()}\n{FRESH[3]}"
    example = measure_overlap(DOCUMENTS, [FRESH[0], long, "x" * 9]).example
    assert example == DOCUMENTS[7][:60].upper()
    assert measure_overlap(DOCUMENTS, DOCUMENTS[:1]).example == DOCUMENTS[0][:60]
    assert measure_overlap(["!!!"], ["!!!"]).example == "!!!"


@pytest.mark.parametrize("texts", [1, 2, 5, 20])
def test_a_license_is_no_overlap(texts):
    train = [LICENSE + document for document in DOCUMENTS[:texts]]
    held_out = [LICENSE + text for text in FRESH[:texts]]
    assert share(train, held_out) == 0
    assert share(train, [*held_out, LICENSE + DOCUMENTS[0]]) > 0


@pytest.mark.parametrize("texts", [5, 20])
def test_a_license_of_most_words_is_no_overlap_if_most_texts_have_it(texts):
    train, held_out = ([LICENSE + text[:300] for text in part] for part in (DOCUMENTS, FRESH))
    assert share(train[:texts], held_out) == 0
    assert share(train[:texts], [held_out[0], train[0].upper()]) == pytest.approx(0.5, abs=0.02)
    assert share(train[:texts], [one_word_changed(train[0]) + " x"]) == 1


@pytest.mark.parametrize("texts", [1, 3, 6, 9])
def test_near_copies_in_most_texts_of_a_small_set_are_no_boilerplate(texts):
    train = [f"{DOCUMENTS[0]}\n\ntext {i}" for i in range(texts)]
    assert share(train, [f"{DOCUMENTS[0]}\n\ntext 100"]) == 1
    assert share([f"{train[0]} {word}" for word in FRESH[0].split()[:texts]], [DOCUMENTS[0]]) == 1


def test_rows_of_a_template_are_different_texts():
    rows = [
        f"Below is an instruction that describes a task. Answer: {prose(6)} is {i}."
        for i in range(60)
    ]
    assert share(rows[:40], rows[40:]) == 0
    assert share(rows[:40], [*rows[40:59], rows[7].lower()]) == pytest.approx(1 / 20, rel=0.2)


def test_a_text_that_is_repeated_in_the_training_text_is_found():
    assert share(DOCUMENTS[:1] * 30, [one_word_changed(DOCUMENTS[0])]) == 1
    assert share([prose(9) + DOCUMENTS[0] for _ in range(30)] + DOCUMENTS[:1], DOCUMENTS[:1]) == 1


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        (["yes", "no"], ["No ", "maybe"], 0.375),
        (["!!!", "x"], ["!!!", "???"], 0.5),
        (["3 + 4 = 7"], ["3 * 4 = 7"], 0),
        ([""], ["x"], 0),
        ([], ["x"], 0),
        (["x"], ["", " "], 0),
        (["a b c", "d e f g h i"], ["a b c d e", "f g h i"], 1),
        (["在线学习的目标是让模型适应新数据"], ["在线学习的目标是让模型适应旧数据"], 1),
        (["สวัสดีชาวโลกทั้งหลาย"], ["สวัสดีชาวโลกทั้งปวง"], 1),
    ],
)
def test_short_texts(train, held_out, expected):
    assert share(train, held_out) == pytest.approx(expected)


def test_the_unicode_form_of_letters_does_not_matter():
    text = "Größe über später täglich möglich für fünf Jahre später gehört natürlich dazu"
    for form in ("NFD", "NFKD"):
        assert share([text], [unicodedata.normalize(form, text) + " und"]) == 1


def test_blocks_and_pieces_change_nothing(monkeypatch):
    held_out = [*FRESH, one_word_changed(DOCUMENTS[3]), DOCUMENTS[4], "\n".join(DOCUMENTS[5:9])]
    expected = measure_overlap(DOCUMENTS, held_out)
    for name, value in (("ngrams.BLOCK_WORDS", 50), ("ngrams._PIECE_CHARACTERS", 100)):
        monkeypatch.setattr(f"hqqtrain.data.{name}", value)
        assert measure_overlap(DOCUMENTS, held_out) == expected
    monkeypatch.setattr("hqqtrain.data.overlap.BLOCK_WORDS", 100)
    assert measure_overlap(DOCUMENTS, held_out) == expected


def test_a_large_overlap_is_an_error_and_a_small_one_a_warning(caplog):
    held_out = ["x" * 1000, "short", "short"]
    check_overlap(["another"], held_out, "", "")
    assert not caplog.text
    check_overlap(["short", ""], held_out, "", "")
    assert "1 of 2 held-out texts, with 0.5% of the characters" in caplog.text
    with pytest.raises(UserError, match=r"99\.5% of the characters.*'xxx"):
        check_overlap(["x" * 1000], held_out, "", "")
    caplog.clear()
    check_overlap(["short", ""], held_out, "data.source=a", None)
    assert not caplog.text
    check_overlap(["x" * 1000], held_out, "data.source=a", None)
    assert "99.5% of the characters" in caplog.messages[-1]
    assert "too good. Remove near copies" in caplog.messages[-1]
