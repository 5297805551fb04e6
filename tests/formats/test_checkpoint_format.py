"""A checkpoint format writes all or nothing, reads back what it wrote, and keeps what it knows."""

import json
from dataclasses import replace

import pytest
import torch
from exports import model_export, stored_tensors, write_export

from hqqtrain.common.errors import UserError
from hqqtrain.formats.base import WrittenModel
from hqqtrain.formats.registry import FORMATS
from hqqtrain.formats.targets.humming import HummingFormat


def test_a_refused_export_leaves_nothing(make_trained, tmp_path):
    def refuse(written: WrittenModel) -> None:
        assert len(written.comparison.layers) == 14
        raise UserError("too far")

    with pytest.raises(UserError, match="too far"):
        FORMATS["humming"].write(model_export(make_trained()), tmp_path / "out", refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_compared_was_read_from_the_files(make_trained, tmp_path, monkeypatch):
    """If a wrong scale is written, the comparison finds it."""
    encode = HummingFormat.encode

    def wrong(self, layer, dtype):
        tensors = encode(self, layer, dtype)
        tensors["weight_scale"] = tensors["weight_scale"] * 1.5
        return tensors

    monkeypatch.setattr(HummingFormat, "encode", wrong)
    written = write_export(make_trained(), "humming", tmp_path / "out")
    assert written.comparison.max_error > 0.5


def test_the_fingerprint_and_the_tokenizer_are_there(make_trained, tmp_path):
    trained = make_trained()
    write_export(trained, "hqq", tmp_path / "out", max_shard_bytes=4096)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hqqtrain_base_fingerprint"] == trained.settings.fingerprint
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_trained_embeddings_go_into_the_base_where_no_adapter_can_hold_them(make_trained, tmp_path):
    trained = make_trained(group_size=None, sizes={"hidden_size": 64, "intermediate_size": 128})
    name = "model.norm.weight"
    state = trained.adapter.state | {f"base_model.model.{name}": torch.full((64,), 3.0)}
    adapter = replace(trained.adapter, state=state)
    for target, expected in (("mlx", 3.0), ("humming", 3.0), ("packed", 1.0)):
        folder = tmp_path / target
        write_export(trained, target, folder, adapter=adapter, adapter_form="separate",
                     dtype=torch.float32)  # fmt: skip
        assert stored_tensors(folder)[name].unique().tolist() == [expected]


def test_an_adapter_of_another_base_is_refused(make_trained, tmp_path):
    trained = make_trained()
    stranger = replace(trained.adapter, fingerprint="sha256:other")
    with pytest.raises(UserError, match="trained on the base sha256:other"):
        write_export(trained, "packed", tmp_path / "out", adapter=stranger, adapter_form="separate")
    write_export(trained, "packed", tmp_path / "out", adapter=stranger, adapter_form="none")
