"""The program that reads a pickle, without its limits, in this process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hqqtrain.models.foreign import unpickle


@pytest.fixture
def convert(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, "_limit", lambda *_: None)

    def run(content, *, max_bytes: int = 1 << 20):
        torch.save(content, tmp_path / "qmodel.pt")
        unpickle.main(str(tmp_path / "qmodel.pt"), str(tmp_path), "0", str(max_bytes), "0")
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        files = {name: load_file(tmp_path / name) for name in set(index.values())}
        return {name: files[file][name] for name, file in index.items()}

    return run


def test_values_become_what_hqq_stores_in_safetensors(convert):
    utils = pytest.importorskip("hqq.core.utils", reason="hqq is not installed here")
    state = {"W_q": torch.arange(6), "shape": torch.Size([2, 3]), "nbits": 4, "optimize": True,
             "beta": 0.5, "packing": "4bit_u8", "compute_dtype": torch.bfloat16}  # fmt: skip
    stored = convert({"model.a": state | {"nothing": None}})
    assert stored.keys() == {f"model.a.{key}" for key in state}
    for key, value in state.items():
        expected = value if key != "compute_dtype" else str(value)
        assert torch.equal(stored[f"model.a.{key}"], utils.encode_safetensor_type(expected))


def test_files_are_limited_and_tied_tensors_are_written(convert, monkeypatch):
    monkeypatch.setattr(unpickle, "MAX_FILE_BYTES", 100)
    tensor = torch.ones(16)
    stored = convert({"a": {"x": tensor, "y": tensor}, "b": {"z": tensor[:3]}})
    assert [stored[name].numel() for name in ("a.x", "a.y", "b.z")] == [16, 16, 3]


def test_a_sparse_tensor(convert):
    with pytest.raises(ValueError, match="not a plain one"):
        convert({"a": {"b": torch.eye(3).to_sparse()}})


def test_a_small_file_that_describes_much(convert):
    with pytest.raises(ValueError, match="its tensors are larger than the file"):
        convert({"a": {"b": torch.zeros(1).expand(1 << 20, 1 << 20)}})


@pytest.mark.parametrize("content", [[1], {"a": 3}, {3: {}}])
def test_another_structure(convert, content):
    with pytest.raises(ValueError, match=r"dict of"):
        convert(content)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Weights only load failed. Set it to `False`. GLOBAL print was not", "it contains print,"),
        ("Weights only load failed. Set it to `False`.", "it contains more than weights"),
        ("is\nwrong", "ValueError: is wrong"),
    ],
)
def test_the_reason_does_not_advise_to_trust_the_file(text, reason):
    assert unpickle._reason(ValueError(text)).startswith(reason)
