"""task=generate uses the run that the same settings have trained, or the model that is named."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.compose.command import compose_command
from hqqtrain.compose.compose import compose_config
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.run import RunConfig

TRAINED = ("recipe=tiny_chat", "train.max_steps=3", "data.chat_template=plain", "run.name=mine")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _train(*words: str, quantized: bool = True, adapter: bool = True) -> Path:
    """Write the files by which the run of a command is recognized, and return its folder."""
    config = compose_config(list(words))
    folder = Path("runs") / config.run_name()
    for name in ["quantized"] * quantized + ["adapter"] * adapter:
        (folder / name).mkdir(parents=True)
        (folder / name / {"quantized": "config.json"}.get(name, "adapter_config.json")).write_text(
            '{"quantization_config": {"quant_method": "hqqtrain"}}'
        )
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config) | {"identity": "x"}))
    return folder


def _generate(*words: str) -> RunConfig:
    return compose_config(["task=generate", *words])


def _notes(*words: str) -> str:
    return " ".join(compose_command(["task=generate", *words], False).notes())


@pytest.mark.parametrize("words", [TRAINED, TRAINED[:3], (), ("model.name_or_path=./dense",)])
def test_the_command_that_has_trained_uses_its_result(words):
    folder = _train(*words)
    config = _generate(*words, "generate.temperature=0", "track.backends=[]")
    assert config.model.name_or_path == str(folder)
    notes = _notes(*words, "generate.top_p=0.5", "generate.temperature=0")
    assert f"uses {folder}, which the same settings have trained" in notes
    assert "train.max_steps" not in notes  # it has selected the run
    assert "generate.top_p: is not used, because generate.temperature=0" in notes


def test_a_run_that_is_named_is_used_with_its_settings():
    folder = _train(*TRAINED)
    for name in (f"{folder}", f"{folder}/quantized"):
        config = _generate(f"model.name_or_path={name}")
        assert config.model.name_or_path == name
        assert config.data.chat_template == "plain"
    notes = _notes(f"model.name_or_path={folder}", "quant.nbits=3", "optim.lr=1", "run.name=x")
    assert f"starts from the settings of {folder}" in notes
    for key in ("quant.nbits", "optim.lr", "run.name"):
        assert f"{key}: is not used" in notes


def test_without_a_run_the_command_is_refused_with_what_to_do():
    _train("recipe=tiny_chat", "train.max_steps=9")
    with pytest.raises(UserError) as raised:
        _generate("recipe=tiny_chat")
    message = str(raised.value)
    assert re.search(r"but runs/tiny_chat-\w{8} does not exist\. Train it with the same", message)
    assert re.search(r"Other runs of this recipe: runs/tiny_chat-\w{8}\.$", message)
    Path("runs/mine").mkdir()
    Path("runs/mine/config.yaml").write_text("task: finetune\n")
    with pytest.raises(UserError, match="runs/mine is not finished"):
        _generate(*TRAINED)


def test_without_a_run_the_model_of_the_recipe_can_be_used_as_it_is():
    quantized = _generate("recipe=tiny_chat", "generate.use=quantized")
    assert (quantized.model.name_or_path, quantized.quant.nbits) == ("tiny", 4)
    dense = _generate("recipe=tiny_chat", "generate.use=full_precision")
    assert (dense.model.name_or_path, dense.quant) == ("tiny", QuantConfig(nbits=None))


def test_the_parts_of_a_run():
    folder = _train(*TRAINED)
    quantized = _generate(*TRAINED, "generate.use=quantized")
    assert quantized.model.name_or_path == str(folder / "quantized")
    dense = _generate(*TRAINED, "generate.use=full_precision")
    assert (dense.model.name_or_path, dense.quant.nbits) == ("tiny", None)
    assert dense.data.chat_template == "plain"
    trained = _generate(f"model.name_or_path={folder}", "generate.use=trained")
    assert trained.model.name_or_path == str(folder)


def test_a_model_is_quantized_only_if_a_key_asks_for_it():
    model = "model.name_or_path=./dense"
    assert _generate(model).quant.nbits is None
    assert "uses ./dense as it is; a key of quant" in _notes(model)
    assert _generate(model, "quant.nbits=4").quant.nbits == 4
    assert "as it is" not in _notes(model, "quant.nbits=4")
    assert _generate(model, "generate.use=quantized").quant.nbits == 4
    assert _generate(model, "recipe=tiny_2bit").quant.nbits == 2
    folder = _train(*TRAINED)
    (folder / "quantized").rename("packed")
    assert _generate("model.name_or_path=packed").quant.quantizes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.name_or_path=x", "generate.use=trained"), "use=trained: x has no adapter"),
        (("model.name_or_path=x", "adapter.init_from=a", "generate.use=quantized"),
         "leaves out the adapter of adapter.init_from=a"),
        (("model.name_or_path=packed", "generate.use=full_precision"),
         "generate.use=full_precision: model.name_or_path=packed is quantized"),
        (("model.name_or_path=runs/taken_over", "generate.use=full_precision"),
         "generate.use=full_precision: model.name_or_path=packed is quantized"),
        (("model.name_or_path=runs/dense", "generate.use=quantized"),
         "runs/dense has quantized nothing"),
        (("model.name_or_path=runs/mine", "generate.use=full_precision"),
         "config.yaml does not say which model was quantized"),
        (("model.name_or_path=x", "launch=slurm"), "launch.backend=slurm: task=generate"),
        (("model.name_or_path=x", "run.resume=must"), "run.resume=must: task=generate"),
    ],
)  # fmt: skip
def test_models_that_do_not_exist(words, message):
    Path("packed").mkdir()
    Path("packed/config.json").write_text('{"quantization_config": {"quant_method": "hqqtrain"}}')
    _train("run.name=dense", quantized=False)
    _train("run.name=taken_over", "model.name_or_path=packed")
    (_train(*TRAINED) / "config.yaml").write_text("identity: x\n")
    with pytest.raises(UserError, match=re.escape(message)):
        _generate(*words)


def test_it_is_one_run_without_a_directory():
    words = ["task=generate", "model.name_or_path=x"]
    assert compose_command(words, False).describe_directories() == (
        "task=generate writes no run directory"
    )
    with pytest.raises(UserError, match="task=generate: cannot be swept"):
        compose_command([*words, "quant.nbits=2,3"], True)
