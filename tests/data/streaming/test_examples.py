"""An endless stream of examples: passes, weights, and the same rest from every place on."""

import json
from collections import Counter
from itertools import count, islice
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.streaming.examples import ExampleStream, StreamPart, StreamSource
from hqqtrain.data.streaming.sources import open_training_stream


def write(file: Path, rows: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(file)


def stream_of(source: object, **data: object) -> ExampleStream:
    return open_training_stream(DataConfig(source=source, **data), EvalConfig(source=None), 5)


def first(stream: ExampleStream, number: int) -> list[str]:
    return [example for _, example in islice(stream.read(stream.start()), number)]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, object]:
    """Return sources of each kind, none of which has more than 20 rows in a pass."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "abc":
        write(folder / f"{name}.jsonl", [f"{name}{i}" for i in range(4)] + ["", "  "])
    (folder / "d.jsonl").touch()
    table = write(tmp_path / "e.jsonl", [f"e{i}" for i in range(3)])
    return {
        "folder": str(folder),
        "list": [str(folder), {"path": table, "repeats": 2.5}],
        "weights": [{"path": str(folder), "weight": 1}, {"path": table, "weight": 3}],
    }


@pytest.mark.parametrize("kind", ["folder", "list", "weights"])
def test_a_stream_continues_from_every_place(sources, kind):
    stream, length = stream_of(sources[kind]), 50
    read = list(islice(stream.read(stream.start()), length))
    for index, (place, _) in enumerate(read):
        rest = list(islice(stream.read(place), length - index - 1))
        assert rest == read[index + 1 :], index
    assert stream_of(sources[kind]).start() == stream.start()


def test_each_pass_has_every_row_once_and_in_order(sources):
    rows = [f"{name}{i}" for name in "abc" for i in range(4)]
    stream = stream_of(sources["folder"])
    assert first(stream, 36) == rows * 3
    first_pass = stream.first_pass()
    assert list(first_pass) == list(first_pass) == rows


def test_repeats_are_those_without_streaming(sources):
    rows = Counter(stream_of(sources["list"]).first_pass())
    assert {rows[f"a{i}"] for i in range(4)} == {1}
    assert all(2 <= rows[f"e{i}"] <= 3 for i in range(3))
    assert rows == Counter(islice(first(stream_of(sources["list"]), 60), sum(rows.values())))


def test_weights_are_the_shares_of_the_examples(tmp_path):
    source = [
        {"path": write(tmp_path / "a.jsonl", ["a"] * 3), "weight": 0.2},
        {"path": write(tmp_path / "b.jsonl", ["b"] * 7), "weight": 0.5},
        {"path": write(tmp_path / "c.jsonl", ["c"]), "weight": 0.3},
    ]
    found = first(stream_of(source), 3000)
    shares = {name: number / 3000 for name, number in Counter(found).items()}
    assert shares == {"a": pytest.approx(0.2, abs=0.03), "b": pytest.approx(0.5, abs=0.03),
                      "c": pytest.approx(0.3, abs=0.03)}  # fmt: skip
    assert all(Counter(found[i : i + 100])["b"] < 75 for i in range(0, 3000, 100))  # well mixed


def test_a_pass_over_sources_with_weights_has_all_rows_of_each(tmp_path):
    source = [
        {"path": write(tmp_path / "a.jsonl", ["a"]), "weight": 1},
        {"path": write(tmp_path / "b.jsonl", [f"b{i}" for i in range(30)]), "weight": 1},
    ]
    found = Counter(stream_of(source).first_pass())
    assert found.pop("a") > 10
    assert set(found) == {f"b{i}" for i in range(30)}


def test_a_source_without_end_needs_no_pass():
    class Endless:
        def __iter__(self):
            return (f"row {number}" for number in count())

    stream = ExampleStream([StreamSource("data.source=endless", [StreamPart(Endless())])])
    place, example = next(islice(stream.read(stream.start()), 5000, None))
    assert (example, place.examples) == ("row 5000", 5001)
    assert next(stream.read(place))[1] == "row 5001"


def test_nothing_to_train_on_is_an_error_and_not_an_endless_loop(tmp_path):
    with pytest.raises(UserError, match="no text in it"):
        first(stream_of(write(tmp_path / "a.jsonl", ["", " "])), 1)
    held_out = DataConfig(source=write(tmp_path / "b.jsonl", ["x"] * 5), validation=0.999999)
    with pytest.raises(UserError, match="has no example to train on; all are empty or held out"):
        first(open_training_stream(held_out, EvalConfig()), 1)


def test_bad_rows_count_over_a_pass_also_if_it_is_resumed(tmp_path):
    lines = [
        '{"text": "a"}',
        '{"text"',
        '{"text": "b"}',
        '{"text"',
        '{"text": "c"}',
        '{"text"',
        '{"text": "d"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    stream = stream_of(str(tmp_path / "a.jsonl"), max_bad_rows=2)
    (place, _), (later, text) = islice(stream.read(stream.start()), 2)
    assert (text, later.places[0].bad_rows) == ("b", 1)
    for start in (place, later):
        with pytest.raises(UserError, match="more than 2 rows"):
            list(islice(stream.read(start), 5))
    allowed = stream_of(str(tmp_path / "a.jsonl"), max_bad_rows=3)
    assert first(allowed, 8) == ["a", "b", "c", "d"] * 2
