"""Combinations of settings that the configuration alone decides."""

from dataclasses import fields

import pytest

from hqqtrain.config.conflicts import CONFIG_CONFLICTS, Conflict, conflict_errors
from hqqtrain.config.groups import OptimConfig
from hqqtrain.config.run import RunConfig

CONFLICT = Conflict(
    {"optim.name": ("paged_adamw",), "task": ("finetune",)},
    "not with task={task}; the rate is {optim.lr}.",
)


def test_a_conflict_applies_only_if_all_its_keys_match():
    groups = {"optim": OptimConfig(name="paged_adamw", lr=0.5), "task": "finetune"}
    (message,) = conflict_errors([CONFLICT], groups)
    assert message == "optim.name=paged_adamw: not with task=finetune; the rate is 0.5."
    assert list(conflict_errors([CONFLICT], groups | {"task": "eval"})) == []
    assert list(conflict_errors([CONFLICT], groups | {"optim": OptimConfig()})) == []


@pytest.mark.parametrize(
    "conflict", CONFIG_CONFLICTS, ids=lambda conflict: next(iter(conflict.keys))
)
def test_every_conflict_is_found_in_a_configuration(conflict):
    config = RunConfig()
    for key, values in conflict.keys.items():
        group, _, name = key.partition(".")
        holder = getattr(config, group) if name else config
        assert hasattr(holder, name or group), key
        setattr(holder, name or group, values[0])
    groups = {field.name: getattr(config, field.name) for field in fields(config)}
    (message,) = conflict_errors([conflict], groups)
    key, _ = message.split("=", 1)
    assert key == next(iter(conflict.keys))
