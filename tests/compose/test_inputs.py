"""The inputs of every task, and which of them are on this machine."""

import pytest

from hqqtrain.compose.inputs import Input, has_inputs_to_check, list_inputs
from hqqtrain.config.groups import DataConfig
from hqqtrain.config.run import RunConfig

MODEL = ("model", "model.name_or_path", "tiny")
TOKENIZER = ("tokenizer", *MODEL[1:])
CALIBRATION = ("calibration text", "data.source", "mine.txt")
TRAINING = ("training text", "data.source", "mine.txt")


def _config(task: str, held_out: str | None = "auto", **adapter: str) -> RunConfig:
    config = RunConfig(task=task)
    config.data.source, config.eval.source = "mine.txt", held_out
    for key, value in adapter.items():
        setattr(config.adapter, key, value)
    return config


@pytest.mark.parametrize(
    ("task", "held_out", "expected"),
    [
        ("finetune", "auto", [MODEL, TRAINING, ("held-out text", "data.source", "mine.txt")]),
        ("finetune", "mine.txt", [MODEL, TRAINING, ("held-out text", "data.source", "mine.txt")]),
        ("finetune", "other", [MODEL, TRAINING, ("held-out text", "eval.source", "other")]),
        ("finetune", None, [MODEL, TRAINING]),
        ("eval", "auto", [MODEL, ("held-out text", "data.source", "mine.txt"), CALIBRATION]),
        ("eval", "other", [MODEL, ("held-out text", "eval.source", "other"), CALIBRATION]),
        ("quantize", "auto", [MODEL, CALIBRATION]),
        ("export", "auto", [MODEL, CALIBRATION]),
        ("data", "auto", [TOKENIZER, TRAINING, ("held-out text", "data.source", "mine.txt")]),
        ("data", None, [TOKENIZER, TRAINING]),
        ("generate", "auto", [MODEL, CALIBRATION]),
    ],
)
def test_the_inputs_of_a_task(task, held_out, expected):
    assert list(list_inputs(_config(task, held_out))) == expected


def test_a_text_of_its_own_to_calibrate_with_is_an_input():
    for task in ("finetune", "eval", "export", "quantize", "data"):
        config = _config(task, None)
        config.quant.calibration = "other.txt"
        found = [item for item in list_inputs(config) if item.kind == "calibration text"]
        expected = (
            [] if task == "data" else [("calibration text", "quant.calibration", "other.txt")]
        )
        assert found == expected
        config.quant.nbits = 8  # needs no text
        assert "calibration text" not in [item.kind for item in list_inputs(config)]


def test_an_adapter_is_an_input_of_all_tasks_but_quantize_and_data():
    for task in ("finetune", "eval", "export", "quantize", "data"):
        kinds = [item.kind for item in list_inputs(_config(task, None, init_from="folder"))]
        assert ("adapter" in kinds) == (task not in ("quantize", "data"))


@pytest.mark.parametrize(
    ("name", "is_local"),
    [
        ("tiny", True), ("./absent", True), ("a/b/c", True), ("absent.jsonl", True), ("here", True),
        ("owner/name", False), ("name", False), ("owner/name:configuration", False),
    ],
)  # fmt: skip
def test_what_is_on_this_machine(name, is_local, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Input("model", "model.name_or_path", name).is_local == is_local


def test_bundled_inputs_need_no_check_unless_the_model_decides():
    config = RunConfig()
    assert not has_inputs_to_check(config)
    config.quant.skip = ["q_proj"]
    assert has_inputs_to_check(config)
    config.model.name_or_path = "owner/name"
    assert not has_inputs_to_check(config)
    assert has_inputs_to_check(_config("finetune"))
    joined = RunConfig()
    joined.eval.protocol = "hqq"
    assert has_inputs_to_check(joined)


def test_of_several_sources_the_one_that_cannot_be_checked_decides(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    mine = str(tmp_path / "a.txt")
    for source, name, is_local in (
        (["python_stdlib", mine], mine, True),
        ([mine, {"path": "org/name", "repeats": 2}, "python_stdlib"], "org/name", False),
        ([{"path": "python_stdlib"}], "python_stdlib", True),
    ):
        config = RunConfig(data=DataConfig(source=source))
        (found,) = (item for item in list_inputs(config) if item.kind == "training text")
        assert (found.name, found.is_local) == (name, is_local)
