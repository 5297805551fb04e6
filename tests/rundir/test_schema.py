"""summary.json and status.json: written and read by the same dataclasses."""

import json
from dataclasses import astuple

import pytest

from hqqtrain.common.reading import read_json
from hqqtrain.rundir.schema import (
    EvalMetrics,
    ModelMetrics,
    QuantizeMetrics,
    Status,
    Summary,
    TrainMetrics,
    read_status,
    read_summary,
)

FULL = {
    "schema": 1,
    "run": {"name": "a", "recipe": "", "task": "finetune", "world_size": 2},
    "quantize": {"nbits": 2, "group_size": None, "bits_per_weight": 2.5},
    "eval": {"tokens": 7, "quantized": {"perplexity": 9.0, "kl": 0.1}},
    "train": {"steps": 3, "loss": None},
}


def test_what_is_absent_stays_absent_there_and_back():
    assert Summary.from_json(FULL).to_json() == FULL
    assert Summary().to_json() == {"schema": 1}


def test_null_is_written_where_it_means_something():
    """No quantization, a group of a whole row, and no loss before the first step are values."""
    assert QuantizeMetrics().to_json() == {"nbits": None, "group_size": None}
    assert TrainMetrics().to_json() == {"loss": None}
    assert Status(status="running").to_json() == {
        "status": "running", "exit_code": None, "slurm_job": None,
    }  # fmt: skip


def test_models_have_the_order_of_the_table():
    metrics = EvalMetrics(final=ModelMetrics(2.0), full_precision=ModelMetrics(1.0))
    assert list(Summary(eval=metrics).measured_models()) == ["full_precision", "final"]
    assert Summary().measured_models() == {}


def test_a_file_of_another_release_gives_the_known_figures(tmp_path):
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({"schema": 9, "train": {"steps": 1, "later": 2}, "more": {}}))
    assert read_summary(file).train == TrainMetrics(steps=1)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", '{"eval": 3, "train": "x"}'])
def test_no_file_and_damaged_files_give_nothing(tmp_path, text):
    file = tmp_path / "summary.json"
    assert read_json(file) == {}
    assert read_status(file) == Status()
    file.write_text(text)
    assert read_summary(file).measured_models() == {}


@pytest.mark.parametrize(
    "values", [[], 5, "x", {"quantize": 5}, {"quantize": {"bits_per_weight": "2"}}, {"eval": []},
               {"eval": {"final": {"perplexity": {}}}}, {"train": {"steps": True}}],
)  # fmt: skip
def test_a_value_of_another_type_is_not_read(values):
    summary = Summary.from_json(values)
    numbers = [v for part in (summary.quantize, summary.train) if part for v in astuple(part)]
    numbers += [m.perplexity for m in summary.measured_models().values()]
    assert not any(value for value in numbers if not isinstance(value, int | float))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "nope", '{"a": ' * 100_000])
def test_a_hostile_file_has_no_values(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert read_summary(tmp_path / "a.json") == Summary(schema=None)
    assert read_status(tmp_path / "a.json") == Status()
