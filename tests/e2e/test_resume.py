"""A run that is stopped, killed, or resumed on other ranks ends like an uninterrupted one."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import SMALL, Finished, run, small_data
from safetensors.torch import load_file

from hqqtrain.tracking.jsonl import read_metrics

WORDS = (
    *SMALL, "run.name=run", "train.max_steps=12", "train.precision=fp32", "ckpt.every=2",
    "adapter.dropout=0.1", "train.micro_batch_size=1", "eval.tokens=256", "eval.every=5",
)  # fmt: skip


def when(root: Path, steps: int, number: int, *ranks: int) -> Callable[[list[int]], None]:
    """Return a function that signals `ranks` once metrics.jsonl has `steps` steps."""

    def send(pids: list[int]) -> None:
        file, end = root / "run" / "metrics.jsonl", time.monotonic() + 120
        while not file.exists() or file.read_text().count("train/loss") < steps:
            assert time.monotonic() < end, "the run did not reach this step"
            time.sleep(0.005)
        for rank in ranks:
            os.kill(pids[rank], number)

    return send


def results(done: Finished) -> dict:
    """Return all results that must not depend on interruptions."""
    folder = done.directory
    files = [folder / "adapter" / "adapter_model.safetensors"]
    files += sorted((folder / "checkpoints" / "step-00000012").glob("*.safetensors"))
    rows = read_metrics(folder / "metrics.jsonl")
    names = ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")
    curves = {name: [(r["train/global_step"], r[name]) for r in rows if name in r]
              for name in names}  # fmt: skip
    tensors = {f"{file.parent.name}/{file.name}": bits(file) for file in files}
    return tensors | curves | {"eval": done.summary["eval"]}


def bits(file: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor; the order of metadata in the file is not fixed."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def status(done: Finished) -> tuple[str, int]:
    found = json.loads((done.directory / "status.json").read_text())
    return found["status"], found["exit_code"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=[1, 2])
def alone(
    data: tuple, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Finished]:
    root = tmp_path_factory.mktemp("alone") / "runs"
    done = run(*WORDS, *data, root=root, processes=request.param)
    assert done.code == 0, done.output
    return request.param, done


def test_stopped_by_a_signal_and_killed(alone: tuple, data: tuple, tmp_path: Path):
    size, whole = alone
    words = (*WORDS, *data)
    root, last = tmp_path / "runs", size - 1
    stopped = run(*words, root=root, processes=size, meanwhile=when(root, 3, signal.SIGUSR1, last))
    assert stopped.code == 3, stopped.output
    assert status(stopped) == ("preempted", 3)
    assert "run the same command again to resume." in stopped.output
    killed = run(*words, root=root, processes=size,
                 meanwhile=when(root, 7, signal.SIGKILL, *range(size)))  # fmt: skip
    assert killed.code == -signal.SIGKILL
    assert status(killed)[0] == "running"
    ended = run(*words, root=root, processes=size)
    assert ended.code == 0, ended.output
    assert "resuming from" in ended.output
    assert "quantizing:" not in ended.output
    assert results(ended) == results(whole)
    assert ended.summary["quantize"] == whole.summary["quantize"] | {
        key: ended.summary["quantize"][key] for key in ("seconds", "peak_memory_gib")
    }
    assert ended.summary["train"]["steps"] == 12


def test_a_checkpoint_is_saved_before_the_time_limit(data: tuple, tmp_path: Path):
    words = (*SMALL, *data, "run.name=run", "train.max_steps=100000", "eval.source=null")
    done = run(*words, "run.time_limit=0:00:12", root=tmp_path / "runs")
    assert done.code == 3, done.output
    assert status(done) == ("preempted", 3)
    assert "run.time_limit=0:00:12" in done.output
    checkpoint = max((done.directory / "checkpoints").glob("step-*"))
    assert json.loads((checkpoint / "state.json").read_text())["step"] == len(done.losses())


ELASTIC = (
    *SMALL, "run.name=run", "train.precision=fp32", "train.global_batch_size=6",
    "optim.schedule=constant", "eval.source=null", "train.packing=false",
)  # fmt: skip


def test_a_run_resumes_on_two_one_three_and_two_ranks(data: tuple, tmp_path: Path):
    whole = run(*ELASTIC, *data, "train.max_steps=4", root=tmp_path / "whole" / "runs")
    assert whole.code == 0, whole.output
    for steps, size in ((1, 2), (2, 1), (3, 3), (4, 2)):
        words = (*ELASTIC, *data, f"train.max_steps={steps}")
        done = run(*words, root=tmp_path / "changing" / "runs", processes=size)
        assert done.code == 0, done.output
        assert len(done.losses()) == steps
    assert done.losses() == pytest.approx(whole.losses(), abs=1e-4)
    assert done.summary["train"]["tokens"] == whole.summary["train"]["tokens"]


@pytest.fixture(scope="module")
def two_runs(data: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple, Finished, Path]:
    """Return arguments, a run of one process, and the root of a run that FSDP2 has begun."""
    folder = tmp_path_factory.mktemp("strategies")
    words = (*ELASTIC, *data, "train.global_batch_size=4", "train.activation_checkpointing=true")
    whole = run(*words, "train.max_steps=4", root=folder / "whole" / "runs")
    assert whole.code == 0, whole.output
    first = (*words, "train.max_steps=1", "parallel.strategy=fsdp2")
    begun = run(*first, root=folder / "begun" / "runs", processes=2)
    assert begun.code == 0, begun.output
    return words, whole, begun.root


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "zero3"])
def test_every_strategy_resumes(two_runs: tuple, tmp_path: Path, strategy: str):
    """Resume from FSDP2, then from the strategy itself; then a single process resumes from it."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    words, whole, begun = two_runs
    root = shutil.copytree(begun, tmp_path / "runs")
    for steps, used in ((2, strategy), (3, strategy), (4, "single")):
        here = (*words, f"train.max_steps={steps}", f"parallel.strategy={used}")
        done = run(*here, root=root, processes=1 if used == "single" else 2)
        assert done.code == 0, done.output
        assert "resuming from" in done.output
    assert done.losses() == pytest.approx(whole.losses(), abs=1e-4)


def test_resuming_with_other_settings_is_refused(alone: tuple, data: tuple, tmp_path: Path):
    size, whole = alone
    if size > 1:
        pytest.skip("refused before ranks communicate, so one rank is enough")
    root = whole.root
    changed = run(*WORDS, *data, "optim.lr=1e-5", root=root)
    assert changed.code == 2
    assert "optim.lr=1e-05 (saved: 0.002)" in changed.output
    fewer = run(*WORDS, *data, "train.max_steps=6", root=root)
    assert fewer.code == 2
    assert "has 12 steps, but train.max_steps or epochs ask for 6" in fewer.output
    must = run(*WORDS, *data, "run.resume=must", root=tmp_path / "runs")
    assert must.code == 2
    assert "run.resume=must" in must.output
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_damaged_checkpoints_are_skipped_or_refused(data: tuple, tmp_path: Path):
    words = (*ELASTIC, *data, "train.global_batch_size=4", "ckpt.every=2")
    root = tmp_path / "runs"
    first = run(*words, "train.max_steps=4", root=root)
    assert first.code == 0, first.output
    saved = sorted((first.directory / "checkpoints").iterdir())
    (saved[-1] / "optimizer.safetensors").write_bytes(b"short")
    more = run(*words, "train.max_steps=6", root=root)
    assert more.code == 0, more.output
    assert "step-00000004/optimizer.safetensors: is not what was written" in more.output
    assert "resuming from" in more.output
    assert [row["train/global_step"] for row in more.metrics if "train/loss" in row][-4:] == [
        3, 4, 5, 6,
    ]  # fmt: skip
    for folder in (first.directory / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    none = run(*words, "train.max_steps=8", root=root)
    assert none.code == 2
    assert "no checkpoint can be used" in none.output
    fresh = run(*words, "train.max_steps=2", "run.resume=never", root=root)
    assert fresh.code == 0, fresh.output
    assert "is deleted" in fresh.output


def test_resume_never_repeats_a_finished_run(data: tuple, tmp_path: Path):
    words = (*ELASTIC, *data, "train.global_batch_size=4", "train.max_steps=2")
    root = tmp_path / "runs"
    first = run(*words, "train.seed=1234567890123", root=root)
    assert first.code == 0, first.output
    again = run(*words, "train.seed=1234567890123", "run.resume=never", root=root)
    assert again.code == 0, again.output
    assert "quantizing:" in again.output
    assert again.losses() == first.losses()


def test_other_held_out_text_is_refused(data: tuple, tmp_path: Path):
    words = (*SMALL, *data, "run.name=run", "train.max_steps=40", "ckpt.every=2")
    root = tmp_path / "runs"
    stopped = run(*words, root=root, meanwhile=when(root, 2, signal.SIGTERM, 0))
    assert stopped.code == 3, stopped.output
    file = Path(data[1].partition("=")[2])
    text = file.read_text()
    try:
        file.write_text("print('other text')\n" * 400)
        other = run(*words, root=root)
    finally:
        file.write_text(text)
    assert other.code == 2
    assert "other text than eval.source gives now" in other.output


def test_training_starts_from_the_adapter_of_a_checkpoint(
    alone: tuple, data: tuple, tmp_path: Path
):
    _, whole = alone
    folder = whole.directory / "checkpoints" / "step-00000012"
    started = run(*SMALL, *data, f"adapter.init_from={folder}", "train.max_steps=1",
                  f"model.name_or_path={whole.directory}", root=tmp_path / "runs")  # fmt: skip
    assert started.code == 0, started.output
    assert started.losses()[0] < whole.losses()[0] - 0.1
