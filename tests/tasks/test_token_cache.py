"""Tokens are written by one process, reused by others, and never trusted blindly."""

import errno
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks import on_ranks

from hqqtrain.common import filelock
from hqqtrain.common.cache_entry import lock_path
from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.common.filelock import try_lock
from hqqtrain.config.run import RunConfig
from hqqtrain.data.packing import EXAMPLES, PACKED
from hqqtrain.data.token_files import INDEX, TokenWriter
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.tasks import datasets
from hqqtrain.tasks import token_cache as module
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import load_held_out_data, load_training_data
from hqqtrain.tasks.token_cache import TokenizedData, cached_tokens


@pytest.fixture
def load(make_config, start_run, monkeypatch, tmp_path: Path):
    """Return a function that loads the data of a run, and counts those that it encodes."""
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "home"))
    calls: list[str] = []
    for name in ("pack_examples", "load_eval_set"):
        real = getattr(datasets, name)

        def count(*args, real=real, name=name, **options):
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(datasets, name, count)

    def load(name: str = "run", **groups) -> tuple[str, str, int]:
        calls.clear()
        config = make_config(**groups)
        config.run.name = name
        with start_run(config) as run:
            training, held_out = (
                load_training_data(run, TINY_FOLDER).sequences,
                load_held_out_data(run, TINY_FOLDER),
            )
        assert held_out is not None
        return training.digest, held_out.digest, len(calls)

    return load


SIZE = r"([\d,]+) tokens \(([\d.]+) MiB\)"


def _entries(tmp_path: Path) -> list[Path]:
    return sorted(path.parent for path in (tmp_path / "home" / "tokens").glob(f"*/{INDEX}"))


def test_a_later_run_reuses_the_tokens(load, tmp_path: Path, caplog):
    caplog.set_level("INFO")
    first = load("one")
    assert first[2] == 2
    (eval_entry, train_entry) = _entries(tmp_path)
    lines = [line for line in caplog.messages if "are written to" in line]
    for line, entry in zip(lines, (train_entry, eval_entry), strict=True):
        tokens, size = re.fullmatch(
            rf"data.cache_dir: {SIZE} are written to {entry}", line
        ).groups()
        assert int(tokens.replace(",", "")) == np.fromfile(entry / f"{EXAMPLES}.tokens", "i4").size
        files = sum(file.stat().st_size for file in entry.iterdir())
        assert float(size) == pytest.approx(files / 2**20, rel=0.1)
    assert [path.name.partition("-")[0] for path in _entries(tmp_path)] == ["eval", "train"]
    caplog.clear()
    assert load("two", optim={"lr": 0.5}, data={"workers": 3}) == (*first[:2], 0)
    reused = [re.search(SIZE + " are reused from (.*)", line) for line in caplog.messages]
    assert len([found for found in reused if found]) == 2
    assert "train.txt: 1 file of text." in caplog.text  # as in the first run


@pytest.mark.parametrize(
    "groups",
    [
        {"train": {"max_seq_len": 31}},
        {"train": {"packing": False}},
        {"data": {"on_long": "truncate"}},
    ],
)
def test_another_setting_has_another_entry(load, tmp_path: Path, groups):
    load()
    load("two", **groups)
    assert len({path.name for path in _entries(tmp_path) if "train" in path.name}) == 2


def test_a_changed_file_has_another_entry(load, tmp_path: Path):
    first = load("one")
    text = (tmp_path / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(text.replace("train_3", "train_4"))
    second = load("two")
    assert second[0] != first[0]
    assert second[2] == 2  # the training text decides whether the held-out text is in it
    (tmp_path / "train.txt").write_text(text)
    assert load("three") == (*first[:2], 0)


@pytest.mark.parametrize("file", [f"{EXAMPLES}.tokens", f"{EXAMPLES}.targets", INDEX])
def test_a_damaged_entry_is_written_again(load, tmp_path: Path, file: str, caplog):
    first = load("one")
    path = _entries(tmp_path)[1] / file
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert load("two") == (*first[:2], 1)
    assert "The tokens are written again." in caplog.text
    assert path.read_bytes() == content or file == INDEX
    assert load("three")[2] == 0


@pytest.mark.parametrize("name", [EXAMPLES, PACKED])
def test_damage_of_chats_that_share_sequences(load, tmp_path: Path, name: str):
    """The tokens of the examples, which task=data shows, have files of their own."""
    chats = tmp_path / "chats.jsonl"
    rows = [json.dumps({"prompt": f"{i}? ", "completion": "ab " * (1 + i % 5)}) for i in range(30)]
    chats.write_text("\n".join(rows))
    data = {"data": {"source": str(chats)}, "eval": {"source": "auto"}}
    first = load("one", **data)
    path = _entries(tmp_path)[1] / f"{name}.tokens"
    path.write_bytes(path.read_bytes()[:-4])
    assert load("two", **data) == (*first[:2], 1)


def test_data_that_change_while_they_are_tokenized_are_an_error(load, tmp_path: Path, monkeypatch):
    """Otherwise the entry of the old content would have the tokens of the new one."""
    real = datasets.training_texts

    def change(*args):
        (tmp_path / "train.txt").open("a").write("one = more\n")
        return real(*args)

    monkeypatch.setattr(datasets, "training_texts", change)
    with pytest.raises(UserError, match="changed while their tokens"):
        load("one")
    assert not _entries(tmp_path)


def test_nothing_of_a_killed_writer_is_trusted(load, tmp_path: Path):
    first = load("one")
    for entry in _entries(tmp_path):
        partial = entry.with_name(f".{entry.name}.partial")
        entry.rename(partial)
        (partial / INDEX).unlink()
    assert load("two") == (*first[:2], 2)
    assert not list((tmp_path / "home" / "tokens").glob("*.partial"))


def test_a_folder_that_cannot_be_written_to_is_read(load, tmp_path: Path, monkeypatch):
    cache = tmp_path / "cache"
    first = load("one", data={"cache_dir": str(cache)})
    assert not _entries(tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hqqtrain.common.cache_entry.try_lock", refuse)
    assert load("two", data={"cache_dir": str(cache)}) == (*first[:2], 0)
    settings = {"cache_dir": str(cache), "on_long": "drop"}
    with pytest.raises(UserError, match=r"data\.cache_dir=.* cannot be written to"):
        load("three", data=settings)


def test_a_home_that_cannot_be_written_to(load, tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "file"))
    load()
    assert len(list((tmp_path / "runs" / "tokens").glob(f"*/{INDEX}"))) == 2


def test_planted_links_are_refused(load, tmp_path: Path):
    load("one")
    entry = _entries(tmp_path)[1]
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        load("two")


def test_an_entry_says_what_it_is_made_from(load, tmp_path: Path):
    load(train={"max_seq_len": 30})
    made_from = json.loads((_entries(tmp_path)[1] / INDEX).read_text())["made_from"]
    assert made_from["data"]["source"] == str(tmp_path / "train.txt")
    assert made_from["train.max_seq_len"] == 30


def _run(comm: Communicator, root: Path) -> Run:
    config = RunConfig()
    config.data.cache_dir = str(root)
    preemption = PreemptionHandler(config.run)
    runtime = SimpleNamespace(comm=comm, preemption=preemption)
    return Run(config, runtime, None)


def _build(note: Path):
    """Return a function that writes two texts, and adds a line to `note`."""

    def build(folder: Path, on_batch):
        with note.open("a") as file:
            file.write("written\n")
        on_batch()
        writer = TokenWriter(folder, EXAMPLES)
        for length in (5, 3):
            writer.append(np.arange(length, dtype=np.int32), np.arange(length) > 0)
        tokens = writer.finish()
        return TokenizedData(tokens, tokens)

    return build


def test_a_run_waits_for_the_one_that_writes(tmp_path: Path, monkeypatch):
    run = _run(SINGLE_PROCESS, tmp_path)
    arguments = (run, "train", dict, _build(tmp_path / "note"))
    entry = cached_tokens(*arguments).folder
    shutil.move(entry, tmp_path / "of another run")
    lock = try_lock(lock_path(entry))
    assert lock is not None

    def end_of_the_other_run(_: float) -> None:
        shutil.move(tmp_path / "of another run", entry)
        lock.close()

    monkeypatch.setattr(module.time, "sleep", end_of_the_other_run)
    assert cached_tokens(*arguments).sequences.stream.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert (tmp_path / "note").read_text() == "written\n"


def test_a_signal_ends_the_wait_for_another_run(tmp_path: Path, monkeypatch):
    run = _run(SINGLE_PROCESS, tmp_path)
    arguments = (run, "train", dict, _build(tmp_path / "note"))
    entry = cached_tokens(*arguments).folder
    shutil.rmtree(entry)
    lock = try_lock(lock_path(entry))

    def stop(_: PreemptionHandler) -> None:
        raise PreemptedError("SIGTERM was received")

    monkeypatch.setattr(PreemptionHandler, "check_local", stop)
    with pytest.raises(PreemptedError):
        cached_tokens(*arguments)
    assert lock is not None


def test_a_time_limit_ends_the_wait_for_another_run(tmp_path: Path, monkeypatch):
    run = _run(SINGLE_PROCESS, tmp_path)
    arguments = (run, "train", dict, _build(tmp_path / "note"))
    entry = cached_tokens(*arguments).folder
    shutil.rmtree(entry)
    lock = try_lock(lock_path(entry))
    monkeypatch.setattr(PreemptionHandler, "stop_reason", "run.time_limit is nearly reached")
    with pytest.raises(PreemptedError, match="time_limit"):
        cached_tokens(*arguments)
    assert lock is not None


def test_a_full_disk_is_reported_with_the_folder_and_leaves_nothing(tmp_path: Path):
    def build(folder: Path, _):
        (folder / "half").write_text("half of the tokens")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        cached_tokens(_run(SINGLE_PROCESS, tmp_path), "train", dict, build)
    assert error.value.filename == str(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def _write_together(rank: int, comm: Communicator, folder: Path) -> None:
    filelock.VISIBILITY_TIMEOUT = 0.2
    shared = _run(comm, folder / "shared")
    expected = [0, 1, 2, 3, 4, 0, 1, 2]
    for _ in range(2):
        found = cached_tokens(shared, "train", lambda: {}, _build(folder / "note"))
        assert found.sequences.stream.tolist() == expected
    assert (folder / "note").read_text() == "written\n"

    own = _run(comm, folder / f"disk of rank {rank}")
    found = cached_tokens(own, "train", lambda: {}, _build(folder / f"note {rank}"))
    assert found.sequences.stream.tolist() == expected
    assert (folder / f"note {rank}").read_text() == "written\n"

    # Its entry would have the name of the text of rank 0, also once the files are the same.
    name = "shared" if rank == 0 else "other"
    with pytest.raises(UserError, match="not the same on all machines"):
        cached_tokens(own, "eval", lambda: {"contents": name}, _build(folder / "note"))
    assert not list(Path(own.config.data.cache_dir).glob("eval-*")) or rank == 0

    def fail(*_: object) -> None:
        raise UserError(f"a row of rank {rank} is bad")

    with pytest.raises(UserError, match="a row of rank 0 is bad"):
        cached_tokens(shared, "eval", lambda: {"other": 1}, fail)
    assert [path.name[:6] for path in (folder / "shared").glob("[!.]*")] == ["train-"]


@pytest.mark.ranks
def test_one_rank_writes_for_all_that_share_its_disk(tmp_path: Path):
    assert on_ranks(_write_together, 2, tmp_path) == ["", ""]


def test_secrets_of_a_source_are_not_written_down(load, tmp_path: Path):
    secret = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
    (tmp_path / f"{secret}.txt").write_text("def f(x):\n    return x\n" * 9)
    load(data={"source": str(tmp_path / f"{secret}.txt")})
    texts = [(entry / INDEX).read_text() for entry in _entries(tmp_path)]
    assert len(texts) == 2
    assert secret not in "".join(texts)
    assert "held_out.txt" in texts[1]
