"""Which rows a rank reads; `test_load.py` shows what becomes of them."""

import pytest
import torch
from torch import nn

from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.loading import rows as module
from hqqtrain.loading.rows import dense_row_ranges, has_rows, is_mine, layer_row_ranges
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.spec import QuantSpec

CPU = torch.device("cpu")


def layer(axis: int) -> HQQLinear:
    spec = QuantSpec(4, 8, axis, "rtn", torch.bfloat16)
    return HQQLinear(16, 24, False, spec)


def test_replicas_take_turns() -> None:
    weights = [nn.Parameter(torch.zeros(2, 2)) for _ in range(5)]
    for rank in range(2):
        comm = Communicator(rank, 2, CPU)
        mine = [is_mine(weight, number, comm) for number, weight in enumerate(weights)]
        assert mine == [number % 2 == rank for number in range(5)]
    assert all(is_mine(weight, 3, SINGLE_PROCESS) for weight in weights)


def test_a_layer_is_read_as_rows_of_its_weight_or_of_its_packed_tensors() -> None:
    dense = list(layer_row_ranges({"a": layer(1), "b": layer(0)}, quantized=False))
    assert [(r.name, r.rows) for r in dense] == [
        ("a.weight", [slice(0, 24)]),
        ("b.weight", [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12), slice(12, 15),
                      slice(15, 18), slice(18, 21), slice(21, 24)]),
    ]  # fmt: skip
    packed = list(layer_row_ranges({"a": layer(1)}, quantized=True))
    assert [r.name for r in packed] == ["a.W_q", "a.scale", "a.zero"]


def test_large_dense_tensors_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_CHUNK_NUMEL", 12)
    tensors = {"w": torch.zeros(7, 4), "scalar": torch.zeros(()), "none": torch.zeros(0, 4)}
    found = [(r.name, r.rows) for r in dense_row_ranges(tensors)]
    assert found == [
        ("w", [slice(0, 3)]), ("w", [slice(3, 6)]), ("w", [slice(6, 7)]), ("scalar", [slice(0, 1)])
    ]  # fmt: skip
    assert not has_rows(tensors["none"])
