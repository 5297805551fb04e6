"""Commands that must not become a batch file: secrets, backslashes, arrays of unequal jobs."""

import re

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.infra import LaunchConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.launch.slurm.validate import (
    check_same_launch,
    refuse_backslash,
    refuse_secrets,
    without_launch,
)

TOKEN = "hf_" + "aB3" * 11


def _slurm(**launch) -> RunConfig:
    return RunConfig(launch=LaunchConfig(backend="slurm", **launch))


def test_runs_that_request_the_same_pass():
    other = _slurm(nodes=2)
    other.quant.nbits = 2
    check_same_launch([_slurm(nodes=2), other])
    check_same_launch([_slurm()])


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"nodes": 3}, r"^launch\.nodes=3: .*another run has 1;"),
        ({"time": "1:00:00"}, r"^launch\.time=1:00:00: .*another run has None;"),
        ({"options": ["--qos=low"]}, r"^launch\.options=\['--qos=low'\]: "),
    ],
)
def test_runs_that_request_different_resources_are_no_array(launch, message):
    with pytest.raises(UserError, match=message):
        check_same_launch([_slurm(), _slurm(), _slurm(**launch)])


@pytest.mark.parametrize(
    "words",
    [
        [f"data.source={TOKEN}"],
        ["data.source=https://me:pw@host/x"],
        ["track.api_key=short"],
        [f"launch.setup=['export X={TOKEN}']"],
        ["+launch.setup=['export MY_PASSWORD=pw']"],
    ],
)
def test_a_secret_in_a_word_is_refused_and_not_repeated(words):
    with pytest.raises(UserError) as caught:
        refuse_secrets(words, LaunchConfig())
    message = str(caught.value)
    assert message.startswith("launch.backend=slurm: the batch file would contain a secret (")
    assert "***" in message
    assert TOKEN not in message
    assert "pw" not in message


@pytest.mark.parametrize(
    "value", ["$(cat file)pw", '"$X"pw', "$X$(f)", "${X}pw", "$(f $(g))", "=$(f)pw"]
)
def test_a_reference_with_an_addition_may_be_a_secret_and_is_not_repeated(value):
    line = f"export MY_PASSWORD={value}"
    for words, setup in (([], [line]), ([f"launch.setup=['{line}']"], [])):
        with pytest.raises(
            UserError, match=r"would contain a secret \(.*MY_PASSWORD=\*\*\*"
        ) as caught:
            refuse_secrets(words, LaunchConfig(setup=setup))
        assert not {"pw", "$X", "$(f"} & set(re.findall(r"pw|\$X|\$\(f", str(caught.value)))


@pytest.mark.parametrize("key", ["setup", "options"])
def test_a_secret_in_a_line_of_the_file_is_refused(key):
    launch = LaunchConfig(**{key: ["ml cuda", "--export=ALL,MY_TOKEN=pw"]})
    with pytest.raises(UserError, match=r"MY_TOKEN=\*\*\*"):
        refuse_secrets([], launch)


@pytest.mark.parametrize(
    "line",
    [
        "export HF_TOKEN=$TOKEN",
        'export HF_TOKEN="${TOKEN}"',
        "export HF_TOKEN=$(cat ~/.token); module load cuda",
        "export HF_TOKEN=$A&&export B=$HF_TOKEN",
    ],
)
def test_a_reference_is_no_secret(line):
    refuse_secrets([f"launch.setup=['{line}']"], LaunchConfig(setup=[line]))


def test_all_secrets_are_listed_at_once():
    with pytest.raises(UserError) as caught:
        refuse_secrets(["a.token=x", "b.password=y"], LaunchConfig(setup=["export C_SECRET=z"]))
    assert str(caught.value).count("***") == 3


def test_a_backslash_in_the_root_is_refused():
    refuse_backslash("/data/runs with spaces/ü")
    with pytest.raises(UserError, match=r"^run\.root=a\\b: .* choose another folder\.$"):
        refuse_backslash("a\\b")


def test_only_launch_keys_are_left_out():
    words = ["launch=slurm", "+launch.nodes=2", "launch.nodes=2", "a=launch.x", "launcher=1", "-m"]
    assert without_launch(words) == ["a=launch.x", "launcher=1", "-m"]
    assert without_launch([]) == []
