"""The cache of quantized weights: the name of an entry, who makes it, and who waits."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqtrain.common import cache_entry as cache_entries
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


def _rewrite(file: Path, position: int) -> None:
    """Change a byte of `file`; keep its size and its modification time."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_model_of_equal_names_sizes_and_times_has_another_entry(
    run: Run, tmp_path: Path, tiny_model: Path
):
    with _entry(run, tmp_path) as entry:
        _make(entry)
    _rewrite(tiny_model / "model.safetensors", -1)
    with _entry(run, tmp_path) as other:
        assert not other.is_complete
    _rewrite(tiny_model / "model.safetensors", -1)
    os.utime(tiny_model / "model.safetensors")  # a copy of the same model
    with _entry(run, tmp_path) as same:
        assert same == CacheEntry(entry.folder, True)


@pytest.mark.parametrize("mode", [0o555, 0o755])
def test_an_entry_that_this_user_cannot_lock_is_read(run: Run, tmp_path: Path, monkeypatch, mode):
    """The folder is read-only, or it belongs to another user."""
    with _entry(run, tmp_path / "cache") as entry:
        _make(entry)
    (tmp_path / "cache").chmod(mode)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_entries, "try_lock", refuse)
    with _entry(run, tmp_path / "cache") as again:
        assert again == CacheEntry(entry.folder, True)
    with (
        pytest.raises(UserError, match="cannot be written to"),
        _entry(run, tmp_path / "cache", nbits=3),
    ):
        pass
    (tmp_path / "cache").chmod(0o755)


def test_planted_links_in_the_cache_are_refused(run: Run, tmp_path: Path):
    (tmp_path / "victim").write_text("mine")
    with _entry(run, tmp_path / "cache") as entry:
        pass
    lock = entry.folder.with_name(f".{entry.folder.name}.lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "victim")
    with (
        pytest.raises(UserError, match=r"quant\.cache_dir=.*symbolic link"),
        _entry(run, tmp_path / "cache"),
    ):
        pass
    assert (tmp_path / "victim").read_text() == "mine"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    entry.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"), _entry(run, tmp_path / "cache"):
        pass


def test_the_entry_of_a_stranger_is_refused_where_everybody_may_write(
    run: Run, tmp_path: Path, monkeypatch
):
    cache = tmp_path / "cache"
    with _entry(run, cache) as entry:
        _make(entry)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with _entry(run, cache) as same:
        assert same.is_complete  # only its owner may write to the cache
    cache.chmod(0o1777)
    real, own = Path.stat, os.getuid()

    def stat(path: Path, **options: Any) -> os.stat_result:
        values = list(real(path, **options))
        values[4] = 12345 if path == entry.folder else values[4]
        return os.stat_result(values)

    assert own == 54321
    monkeypatch.setattr(Path, "stat", stat)
    with (
        pytest.raises(UserError, match=r"everybody may write to it, and .* another user"),
        _entry(run, cache),
    ):
        pass
