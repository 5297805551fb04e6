"""The origin of a run: configuration, inputs and software, compared with a later command."""

import subprocess

import pytest
import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, TrainConfig
from hqqtrain.config.model import ModelConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.run import CHANGEABLE_ON_RESUME, RunConfig
from hqqtrain.rundir import identity
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.identity import (
    changed_inputs,
    check_same_config,
    git_revision,
    input_digests,
    package_versions,
)
from hqqtrain.rundir.yaml_file import read_yaml


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The folder of a run of the default configuration."""
    monkeypatch.chdir(tmp_path)
    with RunDirectory(RunConfig()) as directory:
        directory.begin([])
        return directory.path


def test_the_same_configuration_passes(saved):
    check_same_config(saved, RunConfig())


@pytest.mark.parametrize("key", sorted(CHANGEABLE_ON_RESUME))
def test_keys_that_may_change_on_resume_pass(saved, key):
    group, _, name = key.partition(".")
    config = RunConfig()
    setattr(getattr(config, group), name, "changed")
    check_same_config(saved, config)


def test_the_message_lists_old_and_new_values_of_the_keys_that_differ(saved):
    config = RunConfig(quant=QuantConfig(nbits=2, group_size=None), train=TrainConfig(max_steps=3))
    with pytest.raises(UserError) as caught:
        check_same_config(saved, config)
    message = str(caught.value)
    assert "quant.group_size=null (saved: 64); quant.nbits=2 (saved: 4)" in message
    assert "train.max_steps=3 (saved: null)" in message
    assert "train.seed" not in message


def test_a_run_of_the_release_before_automatic_held_out_text_may_be_resumed(saved):
    values = yaml.safe_load((saved / "config.yaml").read_text())
    del values["data"]["validation"]
    values["eval"]["source"] = "python_stdlib"
    (saved / "config.yaml").write_text(yaml.safe_dump(values))
    check_same_config(saved, RunConfig())
    check_same_config(saved, RunConfig(train=TrainConfig(max_steps=3)))
    with pytest.raises(UserError, match=r"data\.validation=0\.1 \(saved: 0\.02\)"):
        check_same_config(saved, RunConfig(data=DataConfig(validation=0.1)))


def test_a_secret_in_a_value_is_not_shown(saved):
    token = "hf_" + "aB3" * 11
    with pytest.raises(UserError) as caught:
        check_same_config(saved, RunConfig(model=ModelConfig(name_or_path=token)))
    assert token not in str(caught.value)
    assert "model.name_or_path=***" in str(caught.value)


def test_a_key_of_another_release_is_shown_as_absent(saved):
    values = yaml.safe_load((saved / "config.yaml").read_text())
    values["quant"] |= {"later": 1}
    (saved / "config.yaml").write_text(yaml.safe_dump(values | {"identity": "other"}))
    with pytest.raises(UserError, match=r"quant\.later=absent \(saved: 1\)"):
        check_same_config(saved, RunConfig())


@pytest.mark.parametrize(
    "text", ["{", "[1]", "a", "42", "\x00", "a: !!python/object:os.system {}", "quant: {nbits: 4}"]
)
def test_a_damaged_file_is_named_and_never_executed(saved, text):
    (saved / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read \(.*Choose another run"):
        check_same_config(saved, RunConfig())


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"- a\n", b"key: [\n"])
def test_read_yaml_refuses_what_is_no_mapping(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "file")


def test_read_yaml_of_a_missing_file_is_empty(tmp_path):
    (tmp_path / "file").write_text("a: 1\n")
    assert read_yaml(tmp_path / "file") == {"a": 1}
    assert read_yaml(tmp_path / "missing") == {}
    assert read_yaml(tmp_path / "file" / "below") == {}
    with pytest.raises(UserError):
        read_yaml(tmp_path)


def test_digests_of_the_inputs_follow_the_files(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a")
    config = RunConfig(data=DataConfig(source=str(text)))
    first = input_digests(config)
    assert list(first) == ["data.source"]
    config.quant.calibration = str(text)
    assert list(input_digests(config)) == ["data.source", "quant.calibration"]
    config.quant.calibration = None
    text.write_text("ab")
    assert input_digests(config) != first
    text.unlink()
    assert input_digests(config) == {}


def test_digests_of_a_pattern_follow_the_files_that_match(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    config = RunConfig(data=DataConfig(source=str(tmp_path / "*.txt")))
    digests = [input_digests(config)["data.source"]]
    (tmp_path / "c.md").write_text("other")
    digests.append(input_digests(config)["data.source"])
    (tmp_path / "b.txt").write_text("other")
    digests.append(input_digests(config)["data.source"])
    assert digests[0] == digests[1] != digests[2]
    assert changed_inputs({"data.source": digests[0]}, config) == ["data.source"]


def test_digests_of_several_sources_have_their_places(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    source = [str(tmp_path / "a"), {"path": str(tmp_path / "b"), "repeats": 2}, "org/name"]
    config = RunConfig(data=DataConfig(source=source))
    digests = input_digests(config)
    assert list(digests) == ["data.source[0]", "data.source[1]"]
    assert changed_inputs(digests, config) == []
    (tmp_path / "b").write_text("other")
    assert changed_inputs(digests, config) == ["data.source[1]"]
    assert changed_inputs(digests, config, ["data.source"]) == ["data.source[1]"]
    assert changed_inputs(digests, config, ["eval.source"]) == []


def test_versions_are_those_of_installed_packages(monkeypatch):
    versions = package_versions()
    assert {"python", "torch", "numpy"} <= versions.keys()
    monkeypatch.setattr(identity, "_PACKAGES", ("no-such-package",))
    assert list(package_versions()) == ["python"]


@pytest.mark.parametrize(
    "failure", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10), PermissionError()]
)
def test_a_checkout_without_a_working_git_has_no_revision(monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(identity.subprocess, "run", fail)
    assert git_revision() is None


def test_no_output_of_git_is_no_revision(monkeypatch):
    done = subprocess.CompletedProcess([], 128, stdout="", stderr="not a repository")
    monkeypatch.setattr(identity.subprocess, "run", lambda *_, **__: done)
    assert git_revision() is None
