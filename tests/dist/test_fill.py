"""1, 2, 3 or 4 ranks quantize to the same bits and read each byte of the source once."""

import json
from pathlib import Path

import pytest
import torch
from dist.ranks import CPU, on_ranks
from torch import nn
from transformers import LlamaConfig

from hqqtrain.ckpt import Fingerprint, QuantizedSettings
from hqqtrain.config import QuantConfig
from hqqtrain.dist import ALONE, Processes, shard, spread
from hqqtrain.models import SyntheticReader, build_meta, expected_shapes
from hqqtrain.nn import quantize_model
from hqqtrain.tasks.filling import fill_model

CASES = [
    (nbits, group_size, axis)
    for nbits in (8, 4, 3, 2, 1) for group_size, axis in ((16, 1), (32, 0), (None, 1), (None, 0))
]  # fmt: skip


def make_model(nbits: int, group_size: int | None, axis: int) -> nn.Module:
    """Build a model whose rows 2, 3 and 4 ranks share unevenly, with biases and tied embeddings."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=96, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, attention_bias=True,
        tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    model = build_meta(config, torch.float32)
    quantize_model(model, QuantConfig(nbits=nbits, group_size=group_size, axis=axis, solver="hqq"))
    return model


def quantized(case: tuple, processes: Processes, strategy: str) -> tuple[str, int, int]:
    """Return (fingerprint, bytes that this rank has read, bytes of the source)."""
    model = make_model(*case)
    reader = SyntheticReader(expected_shapes(model, packed=False), torch.bfloat16, CPU)
    if strategy == "spread":
        spread(model, CPU, processes.size)
    elif strategy != "ddp" and processes.size > 1:
        shard(model, CPU, processes.size, replicas=2 if strategy == "hybrid" else 1)
    found = Fingerprint()
    fill_model(model, reader, processes, on_rows=found.update)
    total = Fingerprint()
    for part in processes.gather(found.total):
        total.merge(part)
    settings = QuantizedSettings.of(model).by_module()
    return total.hexdigest(settings), reader.bytes_read, reader.total_bytes


def quantize_all(rank: int, processes: Processes, folder: Path, strategy: str) -> None:
    answers = [quantized(case, processes, strategy) for case in CASES]
    (folder / f"{rank}.json").write_text(json.dumps(answers))


@pytest.fixture(scope="module")
def alone() -> list[tuple[str, int, int]]:
    return [quantized(case, ALONE, "single") for case in CASES]


@pytest.mark.parametrize(("size", "strategy"), [
    (2, "fsdp2"), (3, "fsdp2"), (4, "fsdp2"), (3, "ddp"), (3, "spread"), (4, "hybrid"),
])  # fmt: skip
def test_fingerprint_does_not_depend_on_ranks(
    size: int, strategy: str, alone: list, tmp_path: Path
) -> None:
    assert on_ranks(quantize_all, size, tmp_path, strategy) == [""] * size
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    for number, case in enumerate(CASES):
        answers = [found[number] for found in by_rank]
        assert {answer[0] for answer in answers} == {alone[number][0]}, case
        assert sum(answer[1] for answer in answers) <= 1.05 * answers[0][2], case


def test_cases_have_different_fingerprints(alone: list) -> None:
    assert len({fingerprint for fingerprint, *_ in alone}) == len(CASES)
