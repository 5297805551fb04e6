"""`quant.cache_dir`: an entry is made once, on any number of ranks, even by simultaneous runs."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from runs import SMALL, Finished, run
from safetensors.torch import load_file, save_file

from hqqtrain import models
from hqqtrain.common.filelock import try_lock

QUANTIZE = (*SMALL, "task=quantize", "quant.solver=rtn")


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    root = tmp_path_factory.mktemp("cache")
    first = run(*QUANTIZE, f"quant.cache_dir={root / 'cache'}", root=root / "first", processes=2)
    assert first.code == 0, first.output
    return root / "cache", first


def test_the_second_run_reads_the_entry_of_the_first(made, tmp_path: Path):
    cache, first = made
    (entry,) = entries(cache)
    assert "is made now" in first.output
    again = run(*QUANTIZE, f"quant.cache_dir={cache}", root=tmp_path / "again")
    assert again.code == 0, again.output
    assert f"{entry} is there" in again.output
    ours, theirs = again.summary["quantize"], first.summary["quantize"]
    assert ours["fingerprint"] == theirs["fingerprint"]
    assert ours["relative_error"] == theirs["relative_error"]
    assert ours["bytes_read"] < theirs["bytes_read"] * 0.7  # no projection is read
    assert again.directory.name == first.directory.name, (
        "the cache is not part of the identity of a run"
    )


@pytest.mark.parametrize("other", ["quant.nbits=3", "quant.solver=hqq", "quant.skip=[]"])
def test_other_settings_use_another_entry(made, tmp_path: Path, other: str):
    cache, first = made
    copied = shutil.copytree(cache, tmp_path / "cache")
    done = run(*QUANTIZE, other, f"quant.cache_dir={copied}", root=tmp_path / "runs")
    assert done.code == 0, done.output
    assert len(entries(copied)) == 2
    assert done.summary["quantize"]["fingerprint"] != first.summary["quantize"]["fingerprint"]


def test_another_source_of_the_same_name_uses_another_entry(made, tmp_path: Path):
    model = tmp_path / "tiny"
    shutil.copytree(Path(models.__file__).parent / "tiny", model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    words = (*QUANTIZE, f"model.name_or_path={model}", f"quant.cache_dir={tmp_path / 'cache'}")
    shutil.copytree(made[0], tmp_path / "cache")
    done = run(*words, root=tmp_path / "runs")
    assert done.code == 0, done.output
    assert len(entries(tmp_path / "cache")) == 2


def test_an_altered_packed_source_is_refused(made, tmp_path: Path):
    """Only the manifest notices it, because a norm is not part of the fingerprint."""
    (entry,) = entries(made[0])
    packed = shutil.copytree(entry, tmp_path / "packed")
    (file,) = packed.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    done = run(*SMALL, "task=eval", f"model.name_or_path={packed}", root=tmp_path / "runs")
    assert done.code == 2
    assert "is not what was written" in done.output
    assert "Copy it again" in done.output


def test_an_altered_entry_is_refused(made, tmp_path: Path):
    cache = shutil.copytree(made[0], tmp_path / "cache")
    (entry,) = entries(cache)
    (file,) = entry.glob("*.safetensors")
    tensors = load_file(file)
    next(v for k, v in tensors.items() if k.endswith("W_q"))[0, 0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    done = run(*QUANTIZE, f"quant.cache_dir={cache}", root=tmp_path / "runs")
    assert done.code == 2
    assert "is not what was written" in done.output
    assert str(entry) in done.output


def test_a_signal_stops_a_run_that_waits_for_another(made, tmp_path: Path):
    (entry,) = entries(made[0])
    root, cache = tmp_path / "runs", tmp_path / "cache"

    def signal_while_it_waits(pids: list[int]) -> None:
        end = time.monotonic() + 60
        while "waiting for another run" not in (tmp_path / "output-0.txt").read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(pids[1], signal.SIGTERM)

    with try_lock(cache / f".{entry.name}.lock"):
        done = run(*QUANTIZE, f"quant.cache_dir={cache}", root=root, processes=2, grace=20,
                   limit=20, meanwhile=signal_while_it_waits)  # fmt: skip
    assert done.codes == (3, 3), done.output
    assert "rank 1: SIGTERM was received" in done.output


def test_two_simultaneous_runs_make_an_entry_once(tmp_path: Path):
    slow = "quant.solver=hqq"  # so that the second run comes while the first one quantizes
    words = (*QUANTIZE, slow, f"quant.cache_dir={tmp_path / 'cache'}")
    done: list[Finished] = []

    def start(name: str) -> None:
        done.append(run(*words, root=tmp_path / name / "runs", processes=2))

    threads = [threading.Thread(target=start, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.code for each in done] == [0, 0], done[0].output + done[1].output
    assert sum("is made now" in each.output for each in done) == 1
    assert sum("is there" in each.output for each in done) == 1
    (entry,) = entries(tmp_path / "cache")
    assert set(json.loads((entry / "errors.json").read_text())) == {"layers", "all"}
    assert done[0].summary["quantize"]["fingerprint"] == done[1].summary["quantize"]["fingerprint"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = run(*QUANTIZE, f"quant.cache_dir={tmp_path / 'file' / 'x'}", root=tmp_path / "runs")
    assert done.code == 2
    assert "quant.cache_dir=" in done.output
    assert "cannot be written to" in done.output
    assert not (tmp_path / "runs").exists()
