"""task=eval and task=export of a run start from its settings; the command line overrides them."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.compose.command import compose_command
from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.run_settings import settings_of_packed_model
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.renamed import with_old_names
from hqqtrain.config.run import RunConfig
from hqqtrain.rundir.identity import input_digests

TRAINED = (
    "recipe=tiny_2bit", "train.max_seq_len=128", "train.precision=bf16", "eval.tokens=512",
    "eval.source=held.txt", "data.source=mine.jsonl", "data.text_field=body", "adapter.dtype=bf16",
    "parallel.strategy=fsdp2", "quant.cache_dir=cache", "track.backends=[]", "run.name=mine",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    """Return the folder of a trained run, with the files by which it is recognized."""
    monkeypatch.chdir(tmp_path)
    return _write_run(Path("runs/mine"), asdict(compose_config(list(TRAINED))))


def _write_run(folder: Path, config: dict) -> Path:
    (folder / "quantized").mkdir(parents=True)
    (folder / "quantized" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "hqqtrain"}}'
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"identity": "x"}))
    return folder


def _compose(*words: str) -> RunConfig:
    return compose_config(list(words))


@pytest.mark.parametrize("task", ["eval", "export"])
@pytest.mark.parametrize(
    "name", ["runs/mine", "./runs/mine/", "runs/mine/quantized", "link", "packed"]
)
def test_the_settings_of_the_run_are_the_base(run: Path, task, name):
    Path("link").symlink_to(run)
    Path("packed").symlink_to(run / "quantized")
    config = _compose(f"task={task}", f"model.name_or_path={name}")
    trained = _compose(*TRAINED)
    assert config.eval == trained.eval
    assert config.data == trained.data
    assert config.train == trained.train
    assert (config.adapter.dtype, config.quant.nbits) == ("bf16", 2)


def test_a_run_that_has_quantized_nothing_uses_the_keys_of_quantization(run: Path):
    shutil.rmtree(run / "quantized")
    assert _compose("task=eval", f"model.name_or_path={run}").quant.nbits == QuantConfig().nbits
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    config = _compose("task=eval", f"model.name_or_path={run}")
    assert config.quant.nbits == 2
    assert settings_of_packed_model(config, ["quant.nbits"]) == []


def test_what_belongs_to_the_machine_or_the_directory_is_not_taken(run: Path):
    config, plain = _compose("task=eval", f"model.name_or_path={run}"), RunConfig(task="eval")
    for group in ("parallel", "run", "track", "ckpt", "launch", "export"):
        assert getattr(config, group) == getattr(plain, group)
    assert (config.quant.cache_dir, config.recipe, config.adapter.init_from) == (None, None, None)
    assert config.model.name_or_path == str(run)


def test_the_command_line_and_its_recipe_override_the_run(run: Path):
    words = ("task=eval", f"model.name_or_path={run}", "eval.tokens=99")
    assert _compose(*words).eval.tokens == 99
    assert _compose(*words).train.max_seq_len == 128
    assert _compose(*words, "recipe=tiny_2bit").train.max_seq_len == 256


def test_the_settings_that_a_recipe_replaces_are_named(run: Path):
    Path("own.yaml").write_text(
        "train: {max_seq_len: 99, max_steps: 5, precision: bf16}\n"
        "quant: {nbits: 3}\ndata: {text_field: text}\neval: {tokens: 77}\n"
    )
    words = ("recipe=own.yaml", f"model.name_or_path={run}", "eval.tokens=9")
    message = _warnings(*words)
    assert (
        "warning: recipe=own: replaces settings of the run: train.max_seq_len=99 (run: 128), "
        "data.text_field=text (run: body). Leave the recipe out" in message
    )
    quantized = " ".join(compose_command(["task=quantize", *words], False).notes())
    assert "replaces settings of the run" not in quantized  # it uses none of these
    Path("own.yaml").write_text("train: {max_seq_len: 128}\n")
    assert "replaces" not in _warnings(*words)


@pytest.mark.parametrize("words", [("task=finetune",), ("task=quantize",)])
def test_other_tasks_start_from_the_defaults(run: Path, words):
    config = _compose(*words, f"model.name_or_path={run}")
    assert config.train.max_seq_len == RunConfig().train.max_seq_len


def test_another_model_starts_from_the_defaults(run: Path, tmp_path: Path):
    (tmp_path / "plain").mkdir()
    for name in ("tiny", "plain", "hub/model", str(run / "adapter")):
        assert _compose("task=eval", f"model.name_or_path={name}").eval == RunConfig().eval


def test_a_run_of_an_earlier_release_is_read_with_the_new_names(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = with_old_names(asdict(_compose(*TRAINED, "train.activation_checkpointing=false")))
    assert old["train"]["checkpointing"] is False
    old["train"]["a_key_that_is_gone"] = 1
    folder = _write_run(tmp_path / "old", old)
    config = _compose("task=eval", f"model.name_or_path={folder}")
    assert config.train.activation_checkpointing == "none"
    assert config.train.objective == "next_token"
    assert config.train.max_seq_len == 128


@pytest.mark.parametrize("text", ["[1, 2]", "{", "train: {max_seq_len: many}", ""])
def test_a_damaged_file_is_one_message(run: Path, text):
    (run / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"runs/mine/config\.yaml"):
        _compose("task=eval", f"model.name_or_path={run}")


def test_a_hidden_secret_must_be_given_again(run: Path):
    saved = yaml.safe_load((run / "config.yaml").read_text())
    saved["data"]["source"] = "https://***@host/x"
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    words = ("task=eval", f"model.name_or_path={run}")
    with pytest.raises(UserError, match=r"data\.source=.* contains a secret.*on the command line"):
        _compose(*words)
    assert _compose(*words, "data.source=mine.txt").data.source == "mine.txt"


def test_two_runs_of_a_sweep_have_each_their_own_settings(run: Path, tmp_path: Path):
    other = asdict(_compose(*TRAINED, "train.max_seq_len=64"))
    _write_run(tmp_path / "runs" / "other", other)
    command = compose_command(
        ["task=eval", "model.name_or_path=runs/mine,runs/other"], multirun=True
    )
    assert [job.config.train.max_seq_len for job in command.jobs] == [128, 64]


def test_the_user_is_told_where_settings_come_from_and_which_are_not_used(run: Path):
    words = [
        "task=eval", f"model.name_or_path={run}", "quant.calibration_tokens=1024", "optim.lr=1",
    ]  # fmt: skip
    notes = list(compose_command(words, multirun=False).notes())
    assert notes == [
        "task=eval: starts from the settings of runs/mine/config.yaml; the command line overrides "
        "them.",
        "warning: optim.lr: is not used by task=eval.",
        "warning: quant.calibration_tokens: is not used, because model.name_or_path=runs/mine is "
        "quantized already and keeps its settings.",
    ]


@pytest.mark.parametrize("task", ["eval", "export"])
@pytest.mark.parametrize("setting", [
    "quant.solver=gptq", "quant.overrides={q_proj: {solver: gptq}}", "quant.calibration=gone.txt",
])  # fmt: skip
def test_a_run_that_was_calibrated_needs_no_text_and_knows_its_own_words(run, task, setting):
    folder = _write_run(Path("runs/other"), asdict(compose_config([*TRAINED, setting])))
    config = _compose(f"task={task}", f"model.name_or_path={folder}")
    assert not config.quant.calibrates
    _compose(f"task={task}", f"model.name_or_path={folder}", setting)


def test_a_run_that_has_quantized_nothing_keeps_the_calibration(run: Path):
    folder = _write_run(Path("runs/other"), asdict(compose_config([*TRAINED, "quant.nbits=null"])))
    shutil.rmtree(folder / "quantized")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    config = _compose("task=eval", f"model.name_or_path={folder}", "quant.nbits=4")
    assert config.quant.calibrates


def _warnings(*words: str) -> str:
    return " ".join(compose_command(["task=eval", *words], False).notes())


def _write_run_on_texts(folder: Path) -> Path:
    """Write a run on mine.jsonl, whose held-out text is a part of it, with the digests of files."""
    Path("mine.jsonl").write_text('{"body": "a"}')
    config = compose_config([*TRAINED, "eval.source=auto"])
    return _write_run(folder, asdict(config) | {"inputs": input_digests(config)})


def test_a_text_that_has_changed_since_the_run_is_named(run: Path):
    folder = _write_run_on_texts(Path("runs/other"))
    assert "mine.jsonl" not in _warnings(f"model.name_or_path={folder}")
    Path("mine.jsonl").write_text('{"body": "b"}')
    message = _warnings(f"model.name_or_path={folder}")
    assert "data.source=mine.jsonl: is not the text that runs/other has used" in message
    assert "mine.jsonl" not in _warnings(f"model.name_or_path={folder}", "data.source=new.jsonl",
                                         "eval.source=held.txt")  # fmt: skip


def test_a_larger_held_out_part_than_that_of_the_run_is_named(run: Path):
    folder = _write_run_on_texts(Path("runs/other"))
    message = _warnings(f"model.name_or_path={folder}", "data.validation=0.5")
    assert "data.validation=0.5: runs/other held out 0.02 and was trained on the rest" in message


def test_text_that_the_run_was_trained_on_is_not_held_out(run: Path):
    message = _warnings(f"model.name_or_path={run}", "eval.source=mine.jsonl")
    assert (
        "eval.source=mine.jsonl: runs/mine was trained on mine.jsonl and held out no part"
        in message
    )


def test_a_damaged_config_gives_no_warning_and_no_traceback(run: Path):
    content = {"identity": "x", "inputs": [1], "data": "text", "eval": None}
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert "is not the text" not in _warnings(f"model.name_or_path={run}")
