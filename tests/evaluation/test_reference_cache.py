"""The hidden states of a model are computed once, whoever asks for them, and on any rank."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.evaluation import reference_cache
from hqqtrain.evaluation.reference_cache import INDEX, ReferenceCache
from hqqtrain.formats.manifest import MANIFEST, seal

STATES = {f"batch-{i}": torch.arange(6.0).view(1, 2, 3) + i for i in range(4)}


def _find(
    root: Path, comm: Communicator = SINGLE_PROCESS, model: str = "sha256:0"
) -> tuple[dict[str, Tensor], bool, Any]:
    """Return the hidden states of this rank's batches, whether they are new, and a model."""
    computed, layerwise = [], SimpleNamespace(tuple_size=None)
    keys = sorted(STATES)[comm.rank :: comm.size]

    def compute() -> dict[str, Tensor]:
        computed.append(True)
        layerwise.tuple_size = 2
        return {key: STATES[key] for key in keys}

    cache = ReferenceCache(root, f"eval.cache_dir={root}", comm, PreemptionHandler(RunDirConfig()))
    states = cache.find_or_compute("org/llama", {"model": model}, keys, layerwise, compute)
    assert states.keys() == set(keys)
    assert all(torch.equal(states[key], STATES[key]) for key in keys)
    return states, bool(computed), layerwise


def _entry(root: Path) -> Path:
    (folder,) = root.glob("llama-*")
    return folder


@pytest.mark.parametrize("max_bytes", [1, reference_cache.MAX_FILE_BYTES])
def test_they_are_computed_once(tmp_path: Path, monkeypatch, max_bytes: int) -> None:
    monkeypatch.setattr(reference_cache, "MAX_FILE_BYTES", max_bytes)
    root = tmp_path / "cache"
    assert _find(root)[1]
    _, is_new, layerwise = _find(root)
    assert (is_new, layerwise.tuple_size) == (False, 2)
    files = sorted(file.name for file in _entry(root).glob("*.safetensors"))
    assert files == [f"rank-00000-{i:05}.safetensors" for i in range(4 if max_bytes == 1 else 1)]
    assert json.loads((_entry(root) / INDEX).read_text())["made_from"]["model"] == "sha256:0"
    assert _find(root, model="sha256:1")[1]


def _damage(folder: Path, how: str) -> None:
    if how == "flipped":
        file = next(folder.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        next(folder.glob("*.safetensors")).unlink()
    elif how == "no manifest":
        (folder / MANIFEST).unlink()
    else:  # somebody else's folder, which is what its manifest says
        (folder / INDEX).write_text("[]" if how == "foreign" else '{"batches": {}}')
        seal(folder)


@pytest.mark.parametrize("how", ["flipped", "missing", "no manifest", "foreign", "without batches"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, caplog, how: str) -> None:
    _find(tmp_path)
    _damage(_entry(tmp_path), how)
    with caplog.at_level(logging.WARNING, "hqqtrain"):
        assert _find(tmp_path)[1]
    assert [text for text in caplog.messages if "is damaged, so it is made again" in text]
    assert not _find(tmp_path)[1]


def test_a_link_is_refused(tmp_path: Path) -> None:
    _find(tmp_path)
    entry = _entry(tmp_path)
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        _find(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"eval\.cache_dir=.*cannot be written to"):
        _find(tmp_path / "file")


def _find_on_a_rank(rank: int, comm: Communicator, root: str) -> None:
    assert not _find(Path(root) / "of one", comm)[1]
    assert _find(Path(root) / "of two", comm)[1]
    assert not _find(Path(root) / "of two", comm)[1]


@pytest.mark.ranks
def test_another_number_of_ranks_reads_the_same_entry(tmp_path: Path) -> None:
    assert _find(tmp_path / "of one")[1]
    assert on_ranks(_find_on_a_rank, 2, str(tmp_path)) == ["", ""]
    assert not _find(tmp_path / "of two")[1]
