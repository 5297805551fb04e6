"""A GGUF file is read back by its own package, in whatever order its tensors were written."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from hqqtrain.formats.gguf.writer import GgufFile, TensorEntry, dense_type

ENTRIES = {
    "a": TensorEntry("F32", (3,)), "b": TensorEntry("F16", (5, 7)),
    "c": TensorEntry("Q4_1", (2, 64)), "d": TensorEntry("BF16", (2, 3)),
}  # fmt: skip
TENSORS = {
    "a": torch.arange(3.0), "b": torch.randn(5, 7).half(),
    "c": torch.arange(80, dtype=torch.uint8).view(2, 40), "d": torch.randn(2, 3).bfloat16(),
}  # fmt: skip


def _writer() -> GGUFWriter:
    writer = GGUFWriter(None, "llama")
    writer.add_string("general.name", "x" * 77)
    return writer


def test_tensors_in_any_order(tmp_path):
    with GgufFile(tmp_path / "x.gguf", _writer(), ENTRIES) as file:
        for name in "dbca":
            file.write(name, TENSORS[name])
        file.finish()
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "x.gguf").tensors}
    assert list(found) == list(ENTRIES)
    for name, tensor in TENSORS.items():
        raw = tensor.contiguous().view(torch.uint8).numpy()
        assert np.array_equal(np.asarray(found[name].data).view(np.uint8).ravel(), raw.ravel())
        assert found[name].tensor_type.name == ENTRIES[name].type
        assert found[name].shape.tolist() == list(reversed(ENTRIES[name].shape))


def test_a_missing_tensor_is_noticed(tmp_path):
    with GgufFile(tmp_path / "x.gguf", _writer(), ENTRIES) as file:
        file.write("a", TENSORS["a"])
        with pytest.raises(AssertionError, match="tensors are missing"):
            file.finish()


def test_vectors_are_fp32():
    assert dense_type((4,), torch.float16) == torch.float32
    assert dense_type((4, 4), torch.float16) == torch.float16
