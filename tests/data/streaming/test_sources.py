"""Held-out texts of a stream: never trained on, the first of them measured; and hub streaming."""

import json
from pathlib import Path

import datasets
import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data import hub
from hqqtrain.data.sources import load_held_out_texts, load_training_texts
from hqqtrain.data.streaming.sources import (
    FirstExamples,
    first_training_texts,
    open_training_stream,
    stream_digest,
    streamed_held_out_texts,
)


def write(file: Path, rows: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(file)


def trained(data: DataConfig, evaluation: EvalConfig) -> list:
    return list(open_training_stream(data, evaluation).first_pass())


def test_texts_are_held_out_by_their_hashes(tmp_path):
    rows = [f"text {i % 400}" for i in range(1200)]
    data = DataConfig(source=write(tmp_path / "a.jsonl", rows), validation=0.1, streaming=True)
    held_out, train = list(streamed_held_out_texts(EvalConfig(), data)), trained(data, EvalConfig())
    assert sorted([*held_out, *train]) == sorted(rows)
    assert not set(held_out) & set(train)
    assert 0.06 * 1200 < len(held_out) < 0.14 * 1200
    few = list(streamed_held_out_texts(EvalConfig(tokens=2), data))
    assert few == held_out[: len(few)]
    assert 0 < len(few) < 8


def test_splits_by_name_are_those_without_streaming(tmp_path):
    for name in ("train", "valid"):
        write(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(5)])
    data = DataConfig(source=str(tmp_path), streaming=True)
    for evaluation in (EvalConfig(), EvalConfig(source=None)):
        assert trained(data, evaluation) == list(load_training_texts(data, evaluation))
    assert list(streamed_held_out_texts(EvalConfig(), data)) == [f"valid {i}" for i in range(5)]
    expected = list(load_held_out_texts(EvalConfig(), data))
    assert list(streamed_held_out_texts(EvalConfig(), data)) == expected


def test_the_standard_library_is_split_by_its_modules(monkeypatch):
    splits = {"train": [("a", "text of a"), ("b", "text of b")], "held_out": [("c", "text of c")]}
    monkeypatch.setattr("hqqtrain.data.single_source.stdlib_texts", splits.__getitem__)
    data = DataConfig(source="python_stdlib", streaming=True)
    assert trained(data, EvalConfig()) == ["text of a", "text of b"]
    assert list(streamed_held_out_texts(EvalConfig(), data)) == ["text of c"]


def test_every_source_has_a_part_of_the_held_out_texts(tmp_path):
    source = [
        write(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(900)]) for name in "abc"
    ]
    data = DataConfig(source=source, validation=0.1, streaming=True)
    held_out = list(streamed_held_out_texts(EvalConfig(tokens=10), data))
    assert {text[0] for text in held_out} == set("abc")
    assert 3 * 50 <= sum(map(len, held_out)) <= 200


def test_held_out_text_in_the_beginning_of_the_training_text_is_refused(tmp_path):
    rows = [f"This is the text of row number {i}, and no other row has it." for i in range(50)]
    data = DataConfig(source=write(tmp_path / "a.jsonl", rows), streaming=True)
    evaluation = EvalConfig(source=write(tmp_path / "b.jsonl", rows[:20]))
    with pytest.raises(UserError, match="overlap with the training text"):
        first_training_texts(data, evaluation)
    other = EvalConfig(source=write(tmp_path / "b.jsonl", ["Nothing of this is in the other."] * 3))
    assert list(first_training_texts(data, other)) == rows


def test_no_held_out_text_is_an_error_that_says_what_to_do(tmp_path):
    data = DataConfig(source=write(tmp_path / "a.jsonl", ["a", "b"]), validation=1e-6)
    with pytest.raises(UserError, match=r"none of its texts is held out .* data\.validation"):
        streamed_held_out_texts(EvalConfig(), data)


def test_first_examples_are_bounded():
    texts = [f"{i:04}" for i in range(100)]
    assert list(FirstExamples(texts, max_examples=3)) == texts[:3]
    assert list(FirstExamples(texts, max_characters=10)) == texts[:3]
    even = FirstExamples(texts, lambda text: int(text) % 2 == 0, max_read=20)
    assert list(even) == list(even) == ["0000", "0002", "0004"]


def test_the_digest_changes_with_the_files(tmp_path):
    def digest(rows: list[str]) -> str:
        data = DataConfig(source=write(tmp_path / "a.jsonl", rows))
        return stream_digest(open_training_stream(data, EvalConfig()), data)

    assert digest(["a", "b"]) == digest(["c", "d"]) != digest(["a", "b", "c"])


@pytest.fixture
def hub_data(monkeypatch):
    """Let the hub have a data set of 600 rows and a validation split, which only streams."""
    asked = []

    def load_dataset(name, config, *, streaming=False):
        asked.append(streaming)
        splits = {
            "train": {"text": [f"row {i}" for i in range(600)], "other": list(range(600))},
            "validation": {"text": ["v0", "v1"], "other": [0, 1]},
        }
        return datasets.IterableDatasetDict(
            {k: datasets.Dataset.from_dict(v).to_iterable_dataset() for k, v in splits.items()}
        )

    monkeypatch.setattr(hub, "_is_hub_reachable", lambda *_: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub.stream_hub_dataset.cache_clear()
    yield asked
    hub.stream_hub_dataset.cache_clear()


def test_a_data_set_of_the_hub_is_streamed(hub_data):
    data = DataConfig(source="org/name", streaming=True)
    stream = open_training_stream(data, EvalConfig())
    assert list(stream.first_pass()) == [f"row {i}" for i in range(600)]
    assert list(streamed_held_out_texts(EvalConfig(), data)) == ["v0", "v1"]
    assert hub_data == [True]  # the hub is asked once
    read = stream.read(stream.start())
    place = next(place for place, example in read if example == "row 300")
    assert next(stream.read(place))[1] == "row 301"


def test_a_streamed_split_may_not_know_its_columns(hub_data, monkeypatch):
    def rows():
        yield {"messages": [{"role": "user", "content": "a"}], "id": 1}

    unknown = datasets.IterableDataset.from_generator(rows)
    assert unknown.column_names is None
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda *_, **__: datasets.IterableDatasetDict(train=unknown))  # fmt: skip
    data = DataConfig(source="org/name", streaming=True)
    (chat,) = trained(data, EvalConfig(source=None))
    assert chat.messages[0]["content"] == "a"


def test_a_lost_connection_names_the_row(hub_data, monkeypatch):
    def rows():
        yield {"text": "a"}
        raise ConnectionResetError("connection reset by peer")

    broken = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda *_, **__: datasets.IterableDatasetDict(train=broken))  # fmt: skip
    rows_of_split = hub.HubRows(hub.load_hub_dataset("org/name", "x", streaming=True)["train"], "x")
    with pytest.raises(UserError, match=r"cannot read row .*connection reset by peer"):
        list(rows_of_split.read(None))
