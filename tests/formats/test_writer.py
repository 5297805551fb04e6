"""All ranks together write the files that one process would write, or none of them."""

import json
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file

from hqqtrain.common.errors import UserError
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.formats import writer
from hqqtrain.formats.manifest import file_digest, seal
from hqqtrain.formats.packed import check_quantized
from hqqtrain.formats.writer import collective_atomic_directory, write_shards
from hqqtrain.rundir.directory import RunDirectory

TENSORS = {f"t{i}": torch.arange(i, i + 40, dtype=torch.float32).view(4, 10) for i in range(9)}


def write(folder: Path, comm: Communicator) -> int:
    with collective_atomic_directory(folder, comm) as partial:
        written = write_shards(
            TENSORS.items(), partial, max_bytes=400, comm=comm, compute_checksums=True
        )
        if comm.is_main:
            seal(partial, known_digests=written.digests)
    return written.bytes


def save_all(rank: int, comm: Communicator, folder: Path) -> None:
    assert write(folder, comm) == 9 * 160


@pytest.mark.parametrize("size", [2, 3])
def test_the_files_do_not_depend_on_the_ranks(size, tmp_path):
    write(tmp_path / "one", SINGLE_PROCESS)
    assert on_ranks(save_all, size, tmp_path / "many") == [""] * size
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 5 + 2
    listed = json.loads((tmp_path / "one" / "manifest.json").read_text())["files"]
    assert listed == {n: file_digest(tmp_path / "one" / n) for n in names if n != "manifest.json"}
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == names
    for name in names:
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    found = {
        k: v for p in (tmp_path / "many").glob("*.safetensors") for k, v in load_file(p).items()
    }
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in found)


def check(rank: int, comm: Communicator, folder: Path) -> None:
    check_quantized(folder, comm)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_rank_raises_for_a_corrupt_byte_that_one_finds(number, tmp_path):
    write(tmp_path / "out", SINGLE_PROCESS)
    assert on_ranks(check, 2, tmp_path / "out") == ["", ""]
    file = tmp_path / "out" / f"model-{number:05}-of-00005.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    for message in on_ranks(check, 2, tmp_path / "out"):
        assert message.startswith(f"{file}: is not what was written (its checksum differs)")
        assert f"Delete {tmp_path / 'out'} and run again" in message


def one_disk_is_full(rank: int, comm: Communicator, folder: Path) -> None:
    if rank == 1:
        save_tensors = writer.save_tensors

        def failing(tensors: dict[str, torch.Tensor], path: Path) -> None:
            if path.name == "shard-3":
                raise OSError("no space left on device")
            save_tensors(tensors, path)

        writer.save_tensors = failing
    write(folder, comm)


def test_a_full_disk_leaves_no_files(tmp_path):
    answers = on_ranks(one_disk_is_full, 2, tmp_path / "out")
    assert answers[1] == "OSError: no space left on device"
    assert answers[0] == "rank 1 failed: OSError: no space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_previous_files(tmp_path):
    write(tmp_path / "out", SINGLE_PROCESS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    on_ranks(one_disk_is_full, 2, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_not_shared_is_detected(tmp_path, monkeypatch):
    monkeypatch.setattr("hqqtrain.common.filelock.VISIBILITY_TIMEOUT", 0.3)
    here, there = (RunConfig(run=RunDirConfig(root=str(tmp_path / n), name="a")) for n in "xy")
    with RunDirectory(here) as first:
        RunDirectory(here).check_shared(first.lock_token())
        with pytest.raises(UserError, match=r"run\.root=.*does not see the file that rank 0 wrote"):
            RunDirectory(there).check_shared(first.lock_token())
        with RunDirectory(there), pytest.raises(UserError, match="one shared folder"):
            RunDirectory(there).check_shared(first.lock_token())
