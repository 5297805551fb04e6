"""Training state that some ranks have saved loads on any other number of ranks."""

import json
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hqqtrain.checkpoint.snapshot import StateSnapshot
from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.gather import local_shard_of
from hqqtrain.distributed.local import copy_from_full, local_tensor
from hqqtrain.training.optimizer import build_optimizer
from hqqtrain.training.optimizer_state import OptimizerState

pytestmark = pytest.mark.ranks

ROWS = (130, 3, 1, 64)
"""Rows of the weights. Ranks share them unevenly, and some ranks get none of a weight."""


def make_model(comm: Communicator, replicas: int = 1) -> nn.Module:
    """Build the same weights on any number of ranks, sharded if there are several."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, rows, bias=False) for rows in ROWS))
    if comm.size > 1:
        shape, names = (replicas, comm.size // replicas), ("replicate", "shard")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model, mesh=mesh if replicas > 1 else mesh["shard"])
    return model


class Trained:
    """A model and its optimizer, with gradients that depend only on the step."""

    def __init__(self, name: str, comm: Communicator, replicas: int = 1) -> None:
        self.named = dict(make_model(comm, replicas).named_parameters())
        self.optimizer = build_optimizer(OptimConfig(name=name, lr=0.01), self.named.values())
        self.state = OptimizerState(self.optimizer, self.named)
        self.comm = comm

    def step(self, number: int) -> None:
        for at, param in enumerate(self.named.values()):
            param.grad = torch.zeros_like(param)
            torch.manual_seed(1000 * number + at)
            copy_from_full(param.grad, torch.randn(param.shape))
        self.optimizer.step()

    def save(self, file: Path) -> None:
        snapshot = StateSnapshot(self.comm)
        weights = {n: local_shard_of(p, local_tensor(p), p.shape) for n, p in self.named.items()}
        snapshot.take(weights | dict(self.state.local_shards()))
        if self.comm.is_main:
            save_file(snapshot.tensors(), file, metadata={"updates": str(self.state.step)})

    def load(self, file: Path, updates: int) -> None:
        saved = load_file(file)
        for name, param in self.named.items():
            copy_from_full(param, saved[name])
        self.state.load(saved, updates)


def stage(rank: int, comm: Communicator, folder: Path, name: str, begin: int, end: int,
          replicas: int) -> None:  # fmt: skip
    """Load the file of step `begin`, take the steps to `end` and write the file of `end`."""
    trained = Trained(name, comm, replicas)
    if begin:
        trained.load(folder / str(begin), begin)
    for number in range(begin, end):
        trained.step(number)
    assert trained.state.step == end
    trained.save(folder / str(end))
    (folder / f"{rank}.json").write_text(json.dumps(sorted(dict(trained.state.local_shards()))))


def walk(folder: Path, name: str, *stages: tuple[int, int, int]) -> dict[str, Tensor]:
    """Run `stages`, each (ranks, replicas, step at which it ends), and return the last file."""
    folder.mkdir()
    begin = 0
    for size, replicas, end in stages:
        if size == 1:
            stage(0, SINGLE_PROCESS, folder, name, begin, end, 1)
        else:
            arguments = (folder, name, begin, end, replicas)
            assert on_ranks(stage, size, *arguments) == [""] * size
        begin = end
    names = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(stages[-1][0])]
    assert all(found == names[0] for found in names)
    return load_file(folder / str(begin))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_another_world_size_resumes(tmp_path: Path, name: str):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    whole = walk(tmp_path / "whole", name, (1, 1, 8))
    found = walk(tmp_path / "found", name, (2, 1, 2), (1, 1, 4), (3, 1, 6), (4, 2, 8))
    if name == "adamw":
        assert found.keys() == whole.keys()
        assert [key for key in whole if not torch.equal(found[key], whole[key])] == []
    for key in (key for key in whole if "/" not in key):  # 8-bit states are rounded differently
        distance = (found[key] - whole[key]).norm() / (whole[key] - start(key)).norm()
        assert distance < 0.05, (key, distance)


def start(key: str) -> Tensor:
    return dict(make_model(SINGLE_PROCESS).named_parameters())[key].detach()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_same_world_size_resumes_bit_for_bit(tmp_path: Path, size: int):
    pytest.importorskip("bitsandbytes")
    whole = walk(tmp_path / "whole", "adamw_8bit", (size, 1, 4))
    found = walk(tmp_path / "found", "adamw_8bit", (size, 1, 1), (size, 1, 3), (size, 1, 4))
    assert found.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(found[key], whole[key])] == []
