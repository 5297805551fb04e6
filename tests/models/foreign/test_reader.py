"""A reader shows packed tensors of ours in the place of those of another program."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from hqqtrain.common.errors import UserError
from hqqtrain.models.foreign import reader as reader_module
from hqqtrain.models.foreign.base import ForeignLayer, check_tensor, make_layout, modules_with
from hqqtrain.models.foreign.reader import ForeignReader
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels.reference import unpack

SPEC = QuantSpec(4, 8, 1, "plain", torch.float16)


@dataclass(frozen=True)
class PlainLayer(ForeignLayer):
    """A layer whose codes are stored one by one."""

    def codes(self, stored, units):
        return stored.read_region(f"{self.name}.codes", units)

    def scale(self, stored, units):
        return stored.read_region(f"{self.name}.meta", units, slice(0, 2))

    def zero(self, stored, units):
        return stored.read_region(f"{self.name}.meta", units, slice(2, 4))


def find(stored) -> dict[str, ForeignLayer]:
    names = modules_with(stored, "codes")
    layouts = {n: make_layout(stored, n, SPEC, *stored.stored_shape(f"{n}.codes")) for n in names}
    return {
        name: PlainLayer(name, SPEC, layout, (f"{name}.codes", f"{name}.meta"))
        for name, layout in layouts.items()
    }


@pytest.fixture
def stored(tmp_path) -> dict[str, torch.Tensor]:
    tensors = {
        "a.codes": torch.randint(0, 16, (5, 16), dtype=torch.uint8),
        "a.meta": torch.rand(5, 4, dtype=torch.float16),
        "a.bias": torch.rand(5),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def test_rows_are_converted_when_they_are_read(tmp_path, stored, monkeypatch):
    monkeypatch.setattr(reader_module, "CHUNK_CODES", 32)
    reader = ForeignReader(tmp_path, find)
    assert reader.names == ["a.W_q", "a.bias", "a.scale", "a.zero"]
    assert reader.shape("a.W_q") == (5, 16)
    codes = unpack(reader.read("a.W_q"), 4, 16)
    assert torch.equal(codes, stored["a.codes"])
    assert reader.bytes_read == stored["a.codes"].nbytes
    rows = [slice(3, 5), slice(0, 1)]
    assert torch.equal(reader.read("a.zero", rows), stored["a.meta"][[3, 4, 0], 2:])
    assert torch.equal(reader.read("a.bias", rows), stored["a.bias"][[3, 4, 0]])


@pytest.mark.parametrize(("name", "value", "is_error"), [
    ("a.bias", 0, False), ("a.bias", 1, True), ("a.weight", 1, True), ("b.bias", 1, False),
    ("a.input_smooth", 1, True), ("b.act.scales", 1, True), ("a.k_scale", 1, False),
    ("c.g_idx", 1, True),
])  # fmt: skip
def test_unused_parts_of_a_layer(tmp_path, stored, name, value, is_error):
    stored = {key: value for key, value in stored.items() if key != "a.bias"}
    save_file(stored | {name: torch.full((5,), value)}, tmp_path / "model.safetensors")
    reader = ForeignReader(tmp_path, find)
    expected = {"a.W_q": (5, 16), "a.scale": (5, 2), "a.zero": (5, 2)}
    if is_error:
        with pytest.raises(UserError, match=f"{name} is not known, and without it"):
            reader.check(expected)
    else:
        assert reader.check(expected) == [name]
        assert reader.bytes_read == 0


def test_new_tokens_get_rows(tmp_path, stored):
    reader = ForeignReader(tmp_path, find)
    reader.resize({"a.bias": 7})
    assert torch.allclose(reader.read("a.bias")[5:], stored["a.bias"].mean().expand(2))


def test_tensors_are_checked(tmp_path, stored):
    reader = ForeignReader(tmp_path, find)
    assert check_tensor(reader, "a.bias", (5,), [torch.float32]) == torch.float32
    with pytest.raises(UserError, match=r"a\.gone is missing"):
        check_tensor(reader, "a.gone", (5,), [torch.float32])
    with pytest.raises(UserError, match=r"a\.bias is \[5\] float32, expected .* float16 or int8"):
        check_tensor(reader, "a.bias", (5,), [torch.float16, torch.int8])
    with pytest.raises(UserError, match=r"a\.codes has the shape \[5, 16\]"):
        reader.read_small(["a.bias", "a.codes"])
    assert reader.read_small(["a.bias"]).keys() == {"a.bias"}
