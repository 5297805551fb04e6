"""The cache of quantized weights: the name of an entry, who makes it, and who waits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.loading import cache as module
from hqqtrain.loading.cache import CacheEntry, cache_entry
from hqqtrain.loading.plan import ModelPlan, plan_model
from hqqtrain.loading.source_digest import digest_source
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.model import plan_settings


@pytest.fixture
def run(make_config, start_run) -> Iterator[Run]:
    with start_run(make_config("quantize")) as run:
        yield run


def _plan(run: Run, **quant: object) -> ModelPlan:
    settings = plan_settings(run.config)
    for key, value in quant.items():
        setattr(settings.quant, key, value)
    return plan_model(settings, run.runtime)


def _entry(run: Run, folder: Path, dtype: torch.dtype = torch.float32, **quant: object):
    plan, preemption = _plan(run, **quant), run.runtime.preemption
    digest = digest_source(plan.source, SINGLE_PROCESS, preemption)
    return cache_entry(plan, str(folder), dtype, SINGLE_PROCESS, preemption, digest)


def _make(entry: CacheEntry) -> None:
    entry.folder.mkdir(parents=True)
    (entry.folder / "config.json").write_text("{}")


def test_an_entry_is_incomplete_until_it_was_made(run: Run, tmp_path: Path):
    with _entry(run, tmp_path) as entry:
        assert not entry.is_complete
        assert entry.folder.parent == tmp_path
        assert entry.folder.name.startswith("model-")
        _make(entry)
    with _entry(run, tmp_path) as again:
        assert again == CacheEntry(entry.folder, True)


def test_other_inputs_have_another_entry(run: Run, tmp_path: Path, tiny_model: Path):
    folders = []
    for quant in ({}, {"nbits": 3}, {"group_size": 8}, {"solver": "hqq"}, {"skip": ["*up_proj"]}):
        with _entry(run, tmp_path, **quant) as entry:
            folders.append(entry.folder)
    with _entry(run, tmp_path, torch.bfloat16) as entry:
        folders.append(entry.folder)
    (tiny_model / "generation_config.json").write_text("{}")
    with _entry(run, tmp_path) as entry:
        folders.append(entry.folder)
    assert len(set(folders)) == len(folders)


def test_a_run_waits_for_the_one_that_makes_the_entry(run: Run, tmp_path: Path, monkeypatch):
    """The request to stop ends the wait; a complete entry may be read by several runs."""

    def stop(_: float) -> None:
        monkeypatch.setattr(PreemptionHandler, "stop_reason", "SIGTERM was received")

    monkeypatch.setattr(module.time, "sleep", stop)
    with _entry(run, tmp_path) as entry:
        with pytest.raises(PreemptedError), _entry(run, tmp_path):
            pass
        _make(entry)
    with _entry(run, tmp_path) as first, _entry(run, tmp_path) as second:
        assert first == second == CacheEntry(entry.folder, True)


def test_a_folder_that_cannot_be_written_to(run: Run, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"quant\.cache_dir=.*cannot be written to"),
        _entry(run, tmp_path / "file"),
    ):
        pass
