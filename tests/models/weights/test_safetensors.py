"""Slices equal what safetensors reads; damaged checkpoints are refused with the file's name."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from hqqtrain.common.errors import UserError
from hqqtrain.models.weights import safetensors
from hqqtrain.models.weights.safetensors import SafetensorsReader

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "rows",
    [
        [slice(0, 48)],
        [slice(3, 4)],
        [slice(1, 3), slice(17, 19), slice(33, 35)],
        [slice(5, 5)],
        [slice(40, 48), slice(0, 2)],
    ],
)
def test_rows_are_those_of_the_file(checkpoint, rows):
    whole = load_file(checkpoint / "model.safetensors")[NAME]
    reader = SafetensorsReader(checkpoint)
    found = reader.read(NAME, rows)
    assert torch.equal(found, torch.cat([whole[r] for r in rows]))
    assert reader.bytes_read == found.nbytes


def test_every_tensor_is_read_whole_and_counted_once(checkpoint):
    reader, truth = SafetensorsReader(checkpoint), load_file(checkpoint / "model.safetensors")
    assert reader.names == sorted(truth)
    for name in reader.names:
        assert reader.shape(name) == tuple(truth[name].shape)
        assert reader.dtype(name) == truth[name].dtype
        assert torch.equal(reader.read(name), truth[name])
    assert reader.bytes_read == reader.total_bytes == sum(t.nbytes for t in truth.values())


def test_a_tensor_owns_its_memory(checkpoint):
    reader = SafetensorsReader(checkpoint)
    before = reader.read(NAME).clone()
    reader.read(NAME).zero_()
    reader.read(NAME, [slice(0, 8)]).zero_()
    assert torch.equal(reader.read(NAME), before)


def test_shards_read_like_one_file(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = SafetensorsReader(tmp_path / "one"), SafetensorsReader(tmp_path / "many")
    assert one.names == many.names
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names)


def test_dtypes_and_odd_shapes_survive(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(3, 5).half(),
        "bits": torch.arange(256, dtype=torch.uint8).view(4, 64),
        "experts": torch.randn(2, 3, 5).bfloat16(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    for name, tensor in tensors.items():
        assert reader.read(name).dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)
    assert torch.equal(reader.read("experts", [slice(1, 2)]), tensors["experts"][1:2])


def test_folders_may_have_any_name(checkpoint):
    other = checkpoint.rename(checkpoint.with_name("模型 ünïcode"))
    assert SafetensorsReader(other).read(NAME).shape == (48, 32)


def test_an_alias_is_used_only_where_the_file_lacks_the_name(checkpoint):
    reader = SafetensorsReader(checkpoint, {"lm_head.weight": NAME, "absent.weight": NAME})
    assert reader.shape("lm_head.weight") == (96, 32)
    assert torch.equal(reader.read("absent.weight"), reader.read(NAME))
    assert reader.check({"absent.weight": (48, 32)}) == [n for n in reader.names if n != NAME]


@pytest.mark.parametrize("size", [0, 5, 9, 300, 30000])
def test_a_truncated_file_is_named(checkpoint, size):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors: not a complete safetensors file"):
        SafetensorsReader(checkpoint)


def test_a_file_with_trailing_bytes_is_refused(checkpoint):
    with (checkpoint / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="not a complete"):
        SafetensorsReader(checkpoint)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b"not json",
        struct.pack("<Q", 61) + b'{"a":{"dtype":"F32","shape":[9999],"data_offsets":[0,39996]}}',
        struct.pack("<Q", 57) + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
        b"PK\x03\x04" + bytes(64),
    ],
)
def test_a_hostile_header_is_refused(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        SafetensorsReader(tmp_path)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"\.bin.*pickles.*convert them to safetensors"):
        SafetensorsReader(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match="contains neither"):
        SafetensorsReader(tmp_path)


def _write_index(folder, weight_map):
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def test_a_shard_that_is_missing(tmp_path):
    _write_index(tmp_path, {"a": "model-00001-of-00002.safetensors"})
    with pytest.raises(UserError, match=r"00001-of-00002\.safetensors: missing"):
        SafetensorsReader(tmp_path)


def test_a_file_without_read_permission_need_not_be_downloaded_again(checkpoint, monkeypatch):
    def safe_open(path, framework):  # as safetensors does, checked with 0.8 and mode 0
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr(safetensors, "safe_open", safe_open)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be opened.*may read the file"):
        SafetensorsReader(checkpoint)


def test_a_tensor_that_only_the_index_lists(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    _write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    with pytest.raises(UserError, match=r"x\.safetensors: b is missing"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        SafetensorsReader(tmp_path)


def test_an_index_cannot_leave_its_folder(checkpoint):
    inner = checkpoint / "inner"
    inner.mkdir()
    _write_index(inner, {NAME: "../model.safetensors"})
    with pytest.raises(UserError, match="same folder"):
        SafetensorsReader(inner)


def test_check_finds_what_is_missing(checkpoint):
    reader = SafetensorsReader(checkpoint)
    shapes = {name: reader.shape(name) for name in reader.names}
    assert reader.check(shapes) == []
    with pytest.raises(UserError, match=r"1 of 22 tensors are missing, among them new\.weight"):
        reader.check(shapes | {"new.weight": (1, 2)})


def test_check_finds_a_wrong_shape(checkpoint):
    reader = SafetensorsReader(checkpoint)
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \[48, 32\].*\[64, 32\]"):
        reader.check({NAME: (64, 32)})


def test_names_of_another_architecture_are_refused(checkpoint):
    with pytest.raises(UserError, match="are not those of the architecture"):
        SafetensorsReader(checkpoint).check(
            {"transformer.h.0.attn.weight": (1,), "wte.weight": (1,)}
        )


def test_an_unknown_tensor_is_an_error_not_a_crash(checkpoint):
    with pytest.raises(UserError, match=r"no tensor named nothing\.weight"):
        SafetensorsReader(checkpoint).read("nothing.weight")
