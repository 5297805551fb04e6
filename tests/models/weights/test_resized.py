"""A checkpoint with fewer rows than the model is read with the mean in the rows of new tokens."""

import pytest
import torch
from safetensors.torch import save_file

from hqqtrain.common.errors import UserError
from hqqtrain.models.weights import resized
from hqqtrain.models.weights.resized import ResizedReader


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.setattr(resized, "_CHUNK_ROWS", 3)
    tensors = {"embed": torch.randn(7, 4).bfloat16(), "bias": torch.randn(7), "norm": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = ResizedReader(tmp_path)
    reader.resize({"embed": 9, "bias": 9})
    return reader, tensors


@pytest.mark.parametrize(
    "rows", [None, [slice(0, 9)], [slice(2, 5)], [slice(6, 8)], [slice(8, 9)], [slice(7, 7)],
             [slice(8, 9), slice(0, 1), slice(5, 9)]],
    ids=str,
)  # fmt: skip
def test_rows_equal_those_of_the_whole_tensor(reader, rows):
    reader, tensors = reader
    for name in ("embed", "bias"):
        stored = tensors[name]
        mean = stored.double().mean(0, keepdim=True).to(stored.dtype)
        whole = torch.cat([stored, mean, mean])
        found = reader.read(name, rows)
        assert found.dtype == stored.dtype
        assert torch.equal(found, torch.cat([whole[r] for r in rows or [slice(0, 9)]]))
    assert torch.equal(reader.read("norm"), tensors["norm"])


def test_only_the_rows_may_differ(reader):
    reader, _ = reader
    assert reader.shape("embed") == (9, 4)
    assert reader.check({"embed": (9, 4), "bias": (9,), "norm": (4,)}) == []
    with pytest.raises(UserError, match="embed has shape"):
        reader.check({"embed": (9, 5)})
    with pytest.raises(UserError, match="norm has shape"):
        reader.check({"norm": (5,)})
