"""1, 2, 3 or 4 ranks quantize to the same bits and read each byte of the source once."""

import json
from pathlib import Path

import pytest
import torch
from ranks import CPU, on_ranks
from torch import nn
from transformers import LlamaConfig

from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.strategies.fsdp2 import FSDP2
from hqqtrain.distributed.strategies.row_sharding import shard_rows
from hqqtrain.formats.fingerprint import Fingerprint
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.loading.load import load_model
from hqqtrain.models.build import build_meta
from hqqtrain.models.fqn import expected_shapes
from hqqtrain.models.weights.synthetic import SyntheticReader
from hqqtrain.nn.replace import quantize_model

pytestmark = pytest.mark.ranks

CASES = [
    (nbits, group_size, axis)
    for nbits in (8, 4, 3, 2, 1) for group_size, axis in ((16, 1), (32, 0), (None, 1), (None, 0))
]  # fmt: skip


def make_model(nbits: int, group_size: int | None, axis: int) -> nn.Module:
    """Build a model whose rows 2, 3 and 4 ranks share unevenly, with biases and tied embeddings."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=96, intermediate_size=160, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=1, attention_bias=True,
        tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    model = build_meta(config, torch.float32)
    quantize_model(model, QuantConfig(nbits=nbits, group_size=group_size, axis=axis, solver="hqq"))
    return model


def quantized(case: tuple, comm: Communicator, strategy: str) -> tuple[str, int, int]:
    """Return (fingerprint, bytes that this rank has read, bytes of the source)."""
    model = make_model(*case)
    reader = SyntheticReader(expected_shapes(model, packed=False), torch.bfloat16, CPU)
    if strategy == "spread":
        shard_rows(model, comm)
    elif strategy != "ddp" and comm.size > 1:
        FSDP2(comm, replicas=2 if strategy == "hybrid" else 1).shard(model)
    found = Fingerprint()
    load_model(model, reader, comm, on_rows=found.update)
    total = Fingerprint()
    for part in comm.all_gather_object(found.total):
        total.merge(part)
    settings = QuantizedSettings.from_model(model).by_module()
    return total.hexdigest(settings), reader.bytes_read, reader.total_bytes


def quantize_all(rank: int, comm: Communicator, folder: Path, strategy: str, every: int) -> None:
    answers = [quantized(case, comm, strategy) for case in CASES[::every]]
    (folder / f"{rank}.json").write_text(json.dumps(answers))


@pytest.fixture(scope="module")
def alone() -> list[tuple[str, int, int]]:
    return [quantized(case, SINGLE_PROCESS, "single") for case in CASES]


# Every third case has all values of nbits, of group_size and of axis.
@pytest.mark.parametrize(("size", "strategy", "every"), [
    (3, "fsdp2", 1), (2, "fsdp2", 3), (4, "fsdp2", 3), (3, "ddp", 3), (3, "spread", 3),
    (4, "hybrid", 3),
])  # fmt: skip
def test_fingerprint_does_not_depend_on_ranks(
    size: int, strategy: str, every: int, alone: list, tmp_path: Path
) -> None:
    assert on_ranks(quantize_all, size, tmp_path, strategy, every) == [""] * size
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    expected = [fingerprint for fingerprint, *_ in alone][::every]
    for number, case in enumerate(CASES[::every]):
        answers = [found[number] for found in by_rank]
        assert {answer[0] for answer in answers} == {expected[number]}, case
        assert sum(answer[1] for answer in answers) <= 1.05 * answers[0][2], case


def test_cases_have_different_fingerprints(alone: list) -> None:
    assert len({fingerprint for fingerprint, *_ in alone}) == len(CASES)
