"""A full disk is named by the key of the runs, or by the folder of a cache."""

import errno
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.strategies.unsharded import SingleProcess
from hqqtrain.tasks.resources import translate_resource_errors, workload_of


@pytest.mark.parametrize(("file", "where"), [
    (None, "run.root=runs"), ("runs/mine/adapter/a.safetensors", "run.root=runs"),
    ("cache/model-1/rank-0.safetensors", "cache/model-1"),
])  # fmt: skip
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch, file: str | None, where: str):
    monkeypatch.chdir(tmp_path)
    workload = workload_of(RunConfig())
    strategy = SingleProcess(SINGLE_PROCESS)
    with (
        pytest.raises(UserError, match=f"^{where}: the disk is full"),
        translate_resource_errors(workload, strategy),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", file)


def test_zero3_has_no_lora_blocks():
    config = RunConfig()
    assert workload_of(config).is_fused
    config.parallel.strategy = "zero3"
    assert not workload_of(config).is_fused
