"""Old names of keys: refused with the new one, read in old files, and hashed as before."""

from dataclasses import asdict

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.schema import known_keys
from hqqtrain.config.groups import TrainConfig
from hqqtrain.config.renamed import RENAMED_KEYS, with_new_names, with_old_names
from hqqtrain.config.run import RunConfig


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_is_refused_with_the_new_one_named(old: str, new: str):
    with pytest.raises(UserError, match=rf"^{old}: is called {new} now"):
        compose_config([f"{old}=1"])


def test_an_old_key_of_a_recipe_is_refused_too(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("# mine\ntrain: {checkpointing: false}\n")
    monkeypatch.setenv("HQQTRAIN_RECIPES", str(tmp_path))
    with pytest.raises(UserError, match=r"train\.checkpointing: is called train\.activation_"):
        compose_config(["recipe=mine"])


def test_an_old_value_is_refused_with_the_new_one_named():
    with pytest.raises(UserError, match=r"^train\.objective=sft: is called next_token now"):
        compose_config(["train.objective=sft"])


@pytest.mark.parametrize("value", ["jsonl", "parquet"])
def test_a_value_that_moved_is_refused_with_its_key_and_read_in_old_files(value: str):
    with pytest.raises(UserError, match=rf"^data\.format={value}: .* use data\.file_type={value}"):
        compose_config([f"data.format={value}"])
    old = {"data": {"format": value, "source": "x"}}
    new = {"data": {"format": "auto", "file_type": value, "source": "x"}}
    assert with_new_names(old) == new
    assert with_new_names(new) == new
    assert with_old_names(new) == {"data": {"format": value, "file_type": "auto", "source": "x"}}
    chat = {"data": {"format": "chat", "file_type": value}}
    assert with_old_names(chat) == chat


@pytest.mark.parametrize(("old", "new"), [("activations", "none"), ("all", "parameters")])
def test_offloading_of_activations_is_a_mode_of_checkpointing(old: str, new: str):
    expected = r": .* use train\.activation_checkpointing=offload"
    with pytest.raises(UserError, match=rf"^parallel\.offload={old}{expected}") as raised:
        compose_config([f"parallel.offload={old}"])
    assert (f"with parallel.offload={new}." in str(raised.value)) == (new != "none")
    saved = {"parallel": {"offload": old}, "train": {"checkpointing": True}}
    train = {"activation_checkpointing": "offload"}
    assert with_new_names(saved) == {"parallel": {"offload": new}, "train": train}


def test_new_names_are_keys_and_old_ones_are_none():
    keys = {key for key, _ in known_keys()}
    assert set(RENAMED_KEYS.values()) <= keys
    assert not set(RENAMED_KEYS) & keys


def test_there_and_back():
    values = asdict(RunConfig(train=TrainConfig(activation_checkpointing="full")))
    old = with_old_names(values)
    assert old["train"]["objective"] == "sft"
    assert "checkpointing" in old["train"]
    assert with_new_names(old) == values


def test_the_identity_of_the_first_release():
    """Computed by the first release, at its commit 9747aad: `RunConfig().identity()`."""
    config = RunConfig()
    config.quant.solver, config.quant.calibration = "least_squares", None  # its defaults
    assert config.identity() == "9f2d568df5480030089b273295a2c0e07bfd2a465025e5ee0757f10c2239176a"


def test_a_group_of_a_later_release_enters_the_identity_where_it_is_set():
    packed = RunConfig()
    packed.export.format = "packed"
    assert packed.identity() != RunConfig().identity()
