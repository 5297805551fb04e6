"""`train.profile` writes a trace and a table of the steps after the warm-up."""

import csv
import logging

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.tasks.profiling import SKIPPED_STEPS, WARM_UP_STEPS, profile_steps

BEFORE = SKIPPED_STEPS + WARM_UP_STEPS


def test_the_steps_after_the_warm_up_are_profiled(make_config, start_run, caplog):
    with start_run(make_config(train={"profile": 2})) as run, caplog.at_level(logging.INFO):
        after_step, folder = profile_steps(run, total_steps=BEFORE + 4), run.layout.profile
        for number in range(1, BEFORE + 5):
            torch.rand(64, 64) @ torch.rand(64, 64)
            after_step()
            assert folder.exists() == (number >= BEFORE + 2)
    assert (folder / "trace.json.gz").stat().st_size > 0
    rows = {row["part"]: row for row in csv.DictReader((folder / "parts.csv").open())}
    assert float(rows["products"]["milliseconds"]) > 0
    assert float(rows["products"]["calls"]) == 2  # matmul, and mm in it
    assert "train.profile: 2 steps" in caplog.text
    assert "idle" in caplog.text


def test_a_training_with_too_few_steps_is_refused(make_config, start_run):
    with start_run(make_config(train={"profile": 2})) as run:
        with pytest.raises(UserError, match=rf"train\.profile=2: needs {BEFORE + 2} optimizer"):
            profile_steps(run, total_steps=BEFORE + 1)
        profile_steps(run, total_steps=BEFORE + 2)


def test_nothing_is_profiled_by_default(make_config, start_run):
    with start_run(make_config()) as run:
        after_step = profile_steps(run, total_steps=100)
        for _ in range(10):
            after_step()
        assert not run.layout.profile.exists()
