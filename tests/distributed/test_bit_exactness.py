"""All bit patterns survive every strategy, with real processes; a change is refused."""

import importlib.util
import os

import pytest
import torch
from packaging.version import Version
from ranks import on_ranks

from hqqtrain.common.errors import UserError
from hqqtrain.distributed import bit_exactness
from hqqtrain.distributed.bit_exactness import check_bit_exactness
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.strategies.fsdp2 import FSDP2
from hqqtrain.distributed.strategies.registry import STRATEGIES

pytestmark = pytest.mark.ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STORAGES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8]
NO_BYTES = ["fsdp1"] + ["fsdp2"] * (Version(torch.__version__) < Version("2.12"))
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.mark.parametrize("storage", STORAGES)
def test_patterns_are_complete(storage):
    words = (
        bit_exactness.all_bit_patterns(storage, torch.device("cpu")).contiguous().view(torch.int16)
    )
    assert words.unique().numel() == 1 << 16


def every_storage(rank: int, comm: Communicator) -> None:
    for name, strategy in STRATEGIES.items():
        for storage in STORAGES if name != "zero3" or HAS_DEEPSPEED else ():
            if storage != torch.uint8 or name not in NO_BYTES:
                check_bit_exactness(strategy(comm, storage))


@pytest.mark.parametrize("size", [2, 3])
def test_every_strategy_preserves_bits(size):
    assert on_ranks(every_storage, size) == [""] * size


def one_rank_rewrites(rank: int, comm: Communicator) -> None:
    class Rewriting(FSDP2):
        def roundtrip(self, weight: torch.Tensor) -> torch.Tensor:
            found = super().roundtrip(weight).clone()
            if rank == 1:
                found.view(torch.int16)[found.isnan().view_as(found)] ^= 64  # the quiet bit
            return found

    check_bit_exactness(Rewriting(comm, torch.bfloat16))


def test_a_rewritten_pattern_stops_all_ranks():
    for answer in on_ranks(one_rank_rewrites, 2):
        assert "quant.storage_dtype=bf16: parallel.strategy=fsdp2 changes" in answer
        assert "choose another quant.storage_dtype" in answer


@pytest.mark.gpu
def test_nccl_preserves_bits():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    torch.distributed.init_process_group(
        "nccl", rank=0, world_size=1, device_id=torch.device("cuda:0")
    )
    try:
        every_storage(0, Communicator(0, 1, torch.device("cuda:0")))
    finally:
        torch.distributed.destroy_process_group()


def test_message_counts_changed_words(monkeypatch):
    monkeypatch.setattr(FSDP2, "roundtrip", lambda self, weight: torch.zeros_like(weight))
    with pytest.raises(UserError, match="changes 131070 of"):
        check_bit_exactness(FSDP2(SINGLE_PROCESS, torch.bfloat16))
