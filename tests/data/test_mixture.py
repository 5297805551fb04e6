"""Several sources: each as often as its settings say, and nothing held out is trained on."""

import json
import re
from collections import Counter
from operator import length_hint

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.examples import Completion
from hqqtrain.data.mixture import RepeatedExamples, SourceUse, repeats_of_weights
from hqqtrain.data.sources import dataset_name, load_held_out_texts, load_training_texts

NO_EVAL = EvalConfig(source=None)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Files `a.jsonl` and `b.jsonl` of 40 and 10 texts, and `c.jsonl` of completions."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 40), ("b", 10)):
        rows = ({"text": f"{name} {i} has {i * i}"} for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "c.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    return tmp_path


def counts(source: object, evaluation: EvalConfig = NO_EVAL) -> Counter:
    examples = load_training_texts(DataConfig(source=source, validation=0.1), evaluation)
    return Counter(e[:1] if isinstance(e, str) else e for e in examples)


def test_sources_follow_each_other_and_have_formats_of_their_own(sources):
    found = counts(["a.jsonl", "b.jsonl", {"path": "c.jsonl", "format": "completion"}])
    assert found == {"a": 40, "b": 10, Completion("p", "c"): 1}
    with pytest.raises(UserError, match=r"data\.format=chat: data\.source=c\.jsonl lacks"):
        counts(["a.jsonl", {"path": "c.jsonl", "format": "chat"}])
    with pytest.raises(UserError, match=r"data\.text_field=body: data\.source=a\.jsonl"):
        counts([{"path": "a.jsonl", "text_field": "body"}, "b.jsonl"])
    with pytest.raises(UserError, match=r"data\.source=no\.jsonl: no such file"):
        counts(["a.jsonl", "no.jsonl"])


def test_repeats(sources, caplog):
    caplog.set_level("INFO")
    assert counts(["a.jsonl", {"path": "b.jsonl", "repeats": 3}]) == {"a": 40, "b": 30}
    assert counts([{"path": "b.jsonl", "repeats": 2}]) == {"b": 20}
    assert caplog.messages[-1] == "data.source: the examples of an epoch are 20 (10 x 2) of b.jsonl"
    caplog.clear()
    assert counts(["a.jsonl"]) == {"a": 40}
    assert "epoch" not in caplog.text


def test_the_log_says_how_often_each_source_is_used(sources, caplog):
    caplog.set_level("INFO")
    for source, expected in (
        (
            ["a.jsonl", {"path": "b.jsonl", "repeats": 3}],
            "40 (40 x 1) of a.jsonl, 30 (10 x 3) of b.jsonl",
        ),
        (["b.jsonl", "a.jsonl"], "10 (10 x 1) of b.jsonl, 40 (40 x 1) of a.jsonl"),
        (
            [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 2}],
            "40 (40 x 1) of a.jsonl, 40 (10 x 4) of b.jsonl",
        ),
    ):
        caplog.clear()
        counts(source)
        (message,) = [text for text in caplog.messages if "epoch" in text]
        assert message == f"data.source: the examples of an epoch are {expected}"
    caplog.clear()
    counts(["a.jsonl", "b.jsonl"], EvalConfig())
    numbers = re.findall(r"(\d+) x 1", caplog.text)
    assert sum(map(int, numbers)) == 45  # 5 are held out


def test_the_use_of_a_source_counts_the_examples_that_are_encoded(sources):
    mixed = RepeatedExamples(["one", " \n", "two", Completion("", "")], 2.5, "a")
    found = [example for example in mixed if example != " \n"]
    assert mixed.use == SourceUse("a", 3, 2.5, len(found))
    half = RepeatedExamples([f"text {i}" for i in range(100)], 0.5, "b")
    assert len(list(half)) == half.use.used
    assert half.use.examples == 100


def test_weights_are_shares_of_the_examples_of_an_epoch(sources):
    def weighted(a: float, b: float) -> Counter:
        return counts([{"path": "a.jsonl", "weight": a}, {"path": "b.jsonl", "weight": b}])

    assert weighted(1, 1) == {"a": 40, "b": 40}
    assert weighted(0.5, 0.5) == {"a": 40, "b": 40}
    assert weighted(8, 1) == {"a": 80, "b": 10}
    assert weighted(4, 1) == {"a": 40, "b": 10}
    (sources / "b.jsonl").write_text('{"text": ""}\n{"text": "b"}\n')
    assert weighted(1, 1)["b"] == 40  # blank texts do not count


@pytest.mark.parametrize(
    "source", [["a.jsonl", "b.jsonl"], ["a.jsonl", {"path": "b.jsonl", "repeats": 4}]]
)
def test_what_is_held_out_is_not_trained_on_and_not_repeated(sources, source):
    data = DataConfig(source=source, validation=0.1)
    held_out = list(load_held_out_texts(EvalConfig(), data))
    examples = load_training_texts(data, EvalConfig())
    train = list(examples)
    assert length_hint(examples) in (len(train), 0)
    repeats = 4 if isinstance(source[1], dict) else 1
    assert len(held_out) == len(set(held_out)) == 5
    assert not set(held_out) & set(train)
    assert len(set(train)) == 45
    assert all(n == (repeats if text[0] == "b" else 1) for text, n in Counter(train).items())
    assert dataset_name(EvalConfig(), data) == "a.jsonl + b.jsonl, held-out part"


def test_a_split_of_one_source_is_what_is_held_out(sources):
    (sources / "d").mkdir()
    (sources / "d" / "train.jsonl").write_text('{"text": "one"}\n')
    (sources / "d" / "test.jsonl").write_text('{"text": "two"}\n')
    data = DataConfig(source=["a.jsonl", {"path": "d", "repeats": 2}])
    assert list(load_held_out_texts(EvalConfig(), data)) == ["two"]
    assert counts(data.source, EvalConfig()) == {"a": 40, "o": 2}


def test_a_source_that_is_also_held_out_is_refused(sources):
    with pytest.raises(UserError, match="10 of 10 held-out texts"):
        counts(["a.jsonl", "b.jsonl"], EvalConfig(source="b.jsonl"))


def test_a_fraction_uses_some_examples_once_more_and_always_the_same():
    examples = [f"text {i}" for i in range(2000)]
    mixed = RepeatedExamples(examples, 1.25)
    found = list(mixed)
    assert found == list(mixed)
    assert found[:2000] == examples
    assert 400 < len(found) - 2000 < 600
    assert len(set(found[2000:])) == len(found) - 2000
    half = list(RepeatedExamples(examples, 0.5))
    assert set(found[2000:]) < set(half)


def test_the_smallest_number_of_repeats_is_one():
    assert repeats_of_weights([40, 10], [1, 1]) == [1, 4]
    assert repeats_of_weights([10, 10, 5], [1, 2, 1]) == [1, 2, 2]


def test_the_number_of_examples_is_known_before_they_are_tokenized(sources):
    """It is a hint for the progress, and exact unless an example is repeated by a fraction."""
    for source in ("a.jsonl", ["a.jsonl", "b.jsonl"], [{"path": "a.jsonl", "repeats": 3}]):
        data = DataConfig(source=source, validation=0.1)
        examples = load_training_texts(data, EvalConfig())
        assert length_hint(examples) in (len(list(examples)), 0)
    examples = load_training_texts(DataConfig(source="a.jsonl", validation=0.1), EvalConfig())
    assert length_hint(examples) == 36
    rows = load_training_texts(DataConfig(source="a.jsonl"), NO_EVAL)
    assert length_hint(rows) == 0
    assert len(list(rows)) == length_hint(rows) == 40
