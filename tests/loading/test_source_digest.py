"""The digest of a source is the same at every number of ranks, and depends on every byte."""

import shutil
from pathlib import Path

import pytest
from ranks import on_ranks

from hqqtrain.common import digest
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.loading.source_digest import digest_source
from hqqtrain.models.source import TINY_FOLDER, ModelSource


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the bundled model; no digest of it is remembered."""
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(TINY_FOLDER, tmp_path / "model"))


def digest_of(folder: Path, comm: Communicator, kind: str = "pretrained") -> str:
    source = ModelSource("mine", folder, kind)  # type: ignore[arg-type]
    return digest_source(source, comm, PreemptionHandler(RunDirConfig()))


def write_digest(rank: int, comm: Communicator, folder: Path) -> None:
    digest.BLOCK_BYTES = 1 << 20  # the ranks share the blocks of one file
    (folder.parent / f"{rank}.txt").write_text(digest_of(folder, comm))


@pytest.mark.ranks
def test_ranks_that_share_the_blocks_find_the_same_digest(folder, monkeypatch):
    monkeypatch.setattr(digest, "BLOCK_BYTES", 1 << 20)
    alone = digest_of(folder, SINGLE_PROCESS)
    assert on_ranks(write_digest, 3, folder) == ["", "", ""]
    assert {(folder.parent / f"{rank}.txt").read_text() for rank in range(3)} == {alone}


def test_every_byte_counts_and_only_config_json_for_synthetic_weights(folder):
    before = digest_of(folder, SINGLE_PROCESS), digest_of(folder, SINGLE_PROCESS, "synthetic")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = digest_of(folder, SINGLE_PROCESS), digest_of(folder, SINGLE_PROCESS, "synthetic")
    assert after[0] != before[0]
    assert after[1] == before[1]


def write_digest_of_own_files(rank: int, comm: Communicator, folder: Path) -> None:
    digest_of(folder.parent / f"model{rank or ''}", comm)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_rank_with_other_files_is_named(folder, name: str):
    own = Path(shutil.copytree(folder, folder.parent / "model1"))
    assert on_ranks(write_digest_of_own_files, 2, folder) == ["", ""]
    with (own / name).open("ab") as file:
        file.write(b" ")
    message = (
        f"model.name_or_path=mine: {name} is not the same on rank 1 as on rank 0; use the same "
        "files on all machines."
    )
    assert on_ranks(write_digest_of_own_files, 2, folder) == [message, message]
    (own / name).unlink()
    assert on_ranks(write_digest_of_own_files, 2, folder) == [message, message]


@pytest.mark.ranks
def test_an_unreadable_file_is_the_error_of_every_rank(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    first, second = on_ranks(write_digest_of_config, 2, folder)
    assert "config.json" in first
    assert first == second


def write_digest_of_config(rank: int, comm: Communicator, folder: Path) -> None:
    digest_of(folder, comm, "synthetic")
