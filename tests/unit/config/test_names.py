"""Run names are equal exactly when the keys that define the result are equal."""

import subprocess
import sys

import pytest

from hqqtrain.config import RunConfig


def test_root_and_trackers_do_not_change_the_name():
    config = RunConfig(recipe="tiny_2bit")
    config.run.root, config.track.backends, config.track.project = "/elsewhere", [], "other"
    assert config.run_name() == RunConfig(recipe="tiny_2bit").run_name()


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("quant", "nbits", 3),
        ("quant", "overrides", {"*.q_proj": None}),
        ("train", "seed", 1),
        ("optim", "lr", 3e-4),
        ("model", "revision", "main"),
        ("eval", "tokens", 1024),
    ],
)
def test_every_key_that_defines_the_result_changes_the_name(group, name, value):
    config = RunConfig()
    setattr(getattr(config, group), name, value)
    assert config.run_name() != RunConfig().run_name()


def test_task_changes_the_name():
    assert RunConfig(task="eval").run_name() != RunConfig().run_name()


def test_the_name_is_recipe_or_task_and_a_short_hash():
    assert RunConfig(recipe="mine").run_name() == f"mine-{RunConfig().identity()[:8]}"
    assert RunConfig(task="quantize").run_name().startswith("quantize-")


def test_the_order_of_overrides_does_not_matter():
    one, other = RunConfig(), RunConfig()
    one.quant.overrides = {"a": None, "b": {"nbits": 8, "axis": 0}}
    other.quant.overrides = {"b": {"axis": 0, "nbits": 8}, "a": None}
    assert one.identity() == other.identity()


def test_the_name_is_the_same_in_another_process():
    program = "from hqqtrain.config import RunConfig; print(RunConfig().identity())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {RunConfig().identity()}
