"""How and where a run executes: durations, run names, and values that enter a batch file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refused_configs import refusal

from hqqtrain.common.errors import UserError
from hqqtrain.config.infra import LaunchConfig, RunDirConfig, duration_errors, parse_seconds
from hqqtrain.config.run import RunConfig


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"nodes": 2}, "launch.nodes=2: only applies to Slurm; add launch=slurm."),
        ({"dry_run": True}, "launch.dry_run=True: only applies to Slurm; add launch=slurm."),
        (
            {"backend": "slurm", "time": "0:02:00"},
            "launch.grace=120: must be shorter than launch.time=0:02:00.",
        ),
        (
            {"backend": "slurm", "gpus_per_node": 8, "tasks_per_node": 1},
            "launch.tasks_per_node=1: must be one process for each of launch.gpus_per_node=8",
        ),
    ],
)
def test_slurm_keys_without_effect_arerefusal(values, expected):
    assert expected in refusal(launch=values)


@pytest.mark.parametrize(
    ("group", "name"),
    [("run", "root"), ("launch", "partition"), ("launch", "account"), ("launch", "options")],
)
@pytest.mark.parametrize("broken", ["a\nb", "a\r", "a\x00", "a\tb", "a\x85b", "a\u2028b"])
def test_values_in_a_batch_script_must_be_a_single_line(group, name, broken):
    value = [f"--x={broken}"] if name == "options" else broken
    config = RunConfig(launch=LaunchConfig(backend="slurm"))
    setattr(getattr(config, group), name, value)
    what = "a NUL character" if "\0" in broken else "line breaks"
    with pytest.raises(UserError, match=rf"^{group}\.{name}=.*: must not contain {what}"):
        config.check()


@pytest.mark.parametrize("name", ["partition", "account"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_isrefusal(name, empty):
    message = refusal(launch={"backend": "slurm", name: empty})
    assert message == f"launch.{name}={empty}: must not be empty; use null for the default."


def test_default_is_one_process_per_gpu_or_a_single_one():
    assert LaunchConfig().processes_per_node == 1
    assert LaunchConfig(gpus_per_node=8).processes_per_node == 8
    assert LaunchConfig(tasks_per_node=2).processes_per_node == 2


def test_artifacts_without_wandb_arerefusal():
    message = refusal(track={"artifacts": True, "backends": ["tensorboard"]})
    assert message.startswith("track.artifacts=true: only W&B stores artifacts; add wandb to track")


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".", "..", "-x", "a b", "a\n"])
def test_a_run_name_cannot_leave_the_root(name):
    assert "run.name=" in refusal(run={"name": name})


@pytest.mark.parametrize("name", ["mine", "a.b-c_d+e", "2bit"])
def test_ordinary_run_names_are_fine(name):
    config = RunConfig()
    config.run.name = name
    config.check()
    assert config.run_name() == name


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:00:00", 0), ("4:00:00", 14_400), ("1-12:00:00", 129_600), ("100:0:7", 360_007)],
)
def test_durations_are_those_of_slurm(text, seconds):
    assert list(duration_errors("run.time_limit", text)) == []
    assert parse_seconds(text) == seconds


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_a_duration_is_the_sum_of_its_parts(days, hours, minutes, seconds):
    text = f"{days}-{hours}:{minutes:02}:{seconds:02}"
    assert parse_seconds(text) == 86_400 * days + 3_600 * hours + 60 * minutes + seconds


@pytest.mark.parametrize(
    "text",
    ["", "90", "90:00", "1:60:00", "1:00:60", "-1:00:00", "1-", "1:00:00 ", "1:00:00\n", "4h"],
)
def test_other_notations_are_refused_with_the_key_and_an_example(text):
    (message,) = duration_errors("launch.time", text)
    assert message.startswith(f"launch.time={text}: must be hours:minutes:seconds, such as 4:00:00")
    assert text in refusal(run={"time_limit": text})


def test_no_duration_is_no_error():
    assert list(duration_errors("launch.time", None)) == []


@pytest.mark.parametrize("option", ["qos=low", "--Qos=low", "-", "--", "-qos", "#SBATCH", ""])
def test_only_options_of_sbatch_are_accepted(option):
    message = refusal(launch={"backend": "slurm", "options": [option]})
    assert f"launch.options=[{option}]: must be an option of sbatch" in message


@pytest.mark.parametrize(
    ("name", "size"), [("a" * 201, 201), ("é" * 101, 202), ("漢" * 300, 900)], ids=["a", "é", "漢"]
)
def test_a_name_that_no_file_system_takes_is_refused(name, size):
    assert f"has {size} bytes; must have at most 200" in refusal(run={"name": name})


@pytest.mark.parametrize("name", ["a" * 200, "é" * 100])
def test_a_long_name_is_allowed(name):
    RunConfig(run=RunDirConfig(name=name)).check()
