"""`quantized/` reloads bit for bit, whatever the storage dtype."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.formats.manifest import DamagedError, check_sealed, seal
from hqqtrain.formats.packed import check_quantized, model_tensors
from hqqtrain.formats.quantized_settings import read_quantized_settings
from hqqtrain.loading.load import load_model
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.fqn import expected_shapes
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.models.weights.safetensors import SafetensorsReader
from hqqtrain.nn.replace import replace_linears


def _reload(folder, storage=torch.uint8):
    """Load a model from the folder alone."""
    settings = read_quantized_settings(folder)
    model = build_meta(load_hf_config(folder))
    replace_linears(model, {n: m.spec for n, m in settings.modules.items()}, storage_dtype=storage)
    reader = SafetensorsReader(folder)
    assert reader.check(expected_shapes(model, packed=True)) == []
    load_model(model, reader, Communicator(0, 1, torch.device("cpu")), quantized=True)
    return model.eval()


@pytest.mark.parametrize(
    ("quant", "tied"),
    [
        ({"nbits": 8, "group_size": None}, False),
        ({"nbits": 4, "axis": 0, "group_size": 8}, True),
        ({"nbits": 3, "group_size": 8}, True),
        ({"nbits": 2, "skip": []}, True),
        ({"nbits": 1, "overrides": {"*.o_proj": {"nbits": 8}, "*.k_proj": None}}, False),
    ],
)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_it_reloads_bit_for_bit(make_trained, tmp_path, quant, tied, storage):
    trained = make_trained("qwen2", tied=tied, storage=storage, **quant)
    folder = trained.save(tmp_path / "quantized")
    assert read_quantized_settings(folder) == trained.settings
    again = _reload(folder, torch.float16)
    saved, truth = dict(model_tensors(again)), dict(model_tensors(trained.model))
    assert saved.keys() == truth.keys()
    for name, tensor in truth.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8)), name
    tokens = torch.arange(16).view(2, 8)
    with trained.model.disable_adapter():
        assert torch.equal(again(tokens).logits, trained.model(tokens).logits)


def test_contents_of_the_folder(make_trained, tmp_path):
    trained = make_trained()
    (trained.source / "chat_template.jinja").write_text("{{ x }}")
    folder = trained.save(tmp_path / "quantized")
    files = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
             "tokenizer_config.json", "chat_template.jinja", "manifest.json"}  # fmt: skip
    assert set(os.listdir(folder)) == files
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hqqtrain"
    assert config["quantization_config"]["fingerprint"].startswith("sha256:")
    assert config["architectures"] == ["LlamaForCausalLM"]
    names = load_file(folder / "model.safetensors").keys()
    assert "model.layers.0.mlp.up_proj.W_q" in names
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert load_tokenizer(folder).vocab_size == 4096


def test_sharding_does_not_change_the_tensors(make_trained, tmp_path):
    trained = make_trained()
    one = SafetensorsReader(trained.save(tmp_path / "one"))
    many = SafetensorsReader(trained.save(tmp_path / "many", max_shard_bytes=4096))
    sizes = [p.stat().st_size for p in (tmp_path / "many").glob("*.safetensors")]
    assert len(sizes) > 3
    assert one.total_bytes == many.total_bytes
    assert one.names == many.names
    for name in one.names:
        assert torch.equal(one.read(name), many.read(name))
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_a_failure_while_writing_leaves_nothing(make_trained, tmp_path):
    trained = make_trained()

    def failing():
        yield from list(model_tensors(trained.model))[:5]
        raise UserError("model.layers.1.mlp.up_proj.weight: NaN")

    from hqqtrain.formats.packed import save_quantized

    with pytest.raises(UserError, match="NaN"):
        save_quantized(failing(), tmp_path / "quantized", hf_config=trained.hf_config,
                       settings=trained.settings, source=trained.source)  # fmt: skip
    assert os.listdir(tmp_path) == ["source"]


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def _flip_in_norm(file: Path) -> None:
    """Flip a bit of a full-precision tensor, which no fingerprint covers."""
    header = int.from_bytes(file.read_bytes()[:8], "little")
    listed = json.loads(file.read_bytes()[8 : 8 + header])
    _flip(file, 8 + header + listed["model.norm.weight"]["data_offsets"][0] + 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_in_norm, "its checksum differs"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "bytes instead of"),
        (Path.unlink, "cannot be read"),
    ],
)
def test_damage_is_found_and_named(make_trained, tmp_path, damage, message):
    folder = make_trained().save(tmp_path / "quantized")
    check_quantized(folder, SINGLE_PROCESS)
    damage(folder / "model.safetensors")
    with pytest.raises(
        UserError, match=rf"model\.safetensors: .*{message}.*Delete {folder} and run"
    ):
        check_quantized(folder, SINGLE_PROCESS)


def test_every_file_is_covered(make_trained, tmp_path):
    folder = make_trained().save(
        tmp_path / "quantized", max_shard_bytes=4096, extra_json={"errors.json": [1]}
    )
    assert len(list(folder.iterdir())) > 10
    for file in folder.iterdir():
        whole = file.read_bytes()
        _flip(file, len(whole) // 2)
        with pytest.raises(UserError, match=re.escape(f"{file}: is not what was written")):
            check_quantized(folder, SINGLE_PROCESS)
        file.write_bytes(whole)
    check_quantized(folder, SINGLE_PROCESS)


def test_a_folder_without_a_manifest_is_accepted(make_trained, tmp_path):
    folder = make_trained().save(tmp_path / "quantized")
    (folder / "manifest.json").unlink()
    check_quantized(folder, SINGLE_PROCESS)


def test_known_checksums_are_not_computed_again(tmp_path):
    (tmp_path / "file").write_text("x")
    seal(tmp_path, known_digests={"file": {"bytes": 1, "sha256": "of the writer"}})
    with pytest.raises(DamagedError, match=r"file: .*its checksum differs"):
        check_sealed(tmp_path)


def test_gather_is_called_once_per_tensor(make_trained):
    trained, seen = make_trained(), []
    names = [name for name, _ in model_tensors(trained.model, gather=lambda t: seen.append(t) or t)]
    assert len(seen) == len(names) == len(set(names))
