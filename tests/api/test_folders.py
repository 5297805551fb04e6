"""Folders are saved and loaded bit for bit, with their adapters."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from small_model import small_model
from torch import nn
from transformers import AutoTokenizer

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.config.model import ModelConfig
from hqqtrain.formats.manifest import is_sealed
from hqqtrain.formats.quantized_settings import read_quantized_settings
from hqqtrain.models.offload import offloads_meta
from hqqtrain.models.source import resolve_source
from hqqtrain.nn.staging import StagedTensors

TOKENS = torch.arange(16).view(2, 8)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_saved_and_loaded(quantized, tokenizer, tmp_path: Path):
    folder = tmp_path / "quantized"
    hqqtrain.save_quantized(quantized, folder, tokenizer)
    again = hqqtrain.load_quantized(folder, device="cpu")
    assert torch.equal(logits_of(again), logits_of(quantized))
    assert is_sealed(folder)
    recorded = read_quantized_settings(folder)
    assert recorded.fingerprint == quantized.config.quantization_config.description["fingerprint"]
    assert resolve_source(ModelConfig(name_or_path=str(folder))).kind == "quantized"
    assert AutoTokenizer.from_pretrained(folder)("def f")["input_ids"]
    assert (folder / "generation_config.json").exists()
    assert hqqtrain.load_quantized(folder, dtype="bf16").dtype == torch.bfloat16


def test_meta_on_the_host_is_no_part_of_a_folder(quantized, tmp_path: Path, monkeypatch):
    expected = logits_of(quantized)
    hqqtrain.save_quantized(quantized, tmp_path / "plain")
    monkeypatch.setattr(StagedTensors, "copies_on_cpu", True)
    model = hqqtrain.load_quantized(tmp_path / "plain", device="cpu", offload_meta=True)
    assert offloads_meta(model)
    assert torch.equal(logits_of(model), expected)
    hqqtrain.save_quantized(model, tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    mapped = hqqtrain.load_quantized(tmp_path / "again", device="auto", offload_meta=True)
    assert torch.equal(logits_of(mapped), expected)


def test_an_adapter_names_the_folder_and_its_fingerprint(quantized, tmp_path: Path):
    model = hqqtrain.add_lora(quantized, r=2)
    nn.init.normal_(model.get_parameter(
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"))  # fmt: skip
    hqqtrain.save_quantized(model, tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    for again in (
        hqqtrain.load_quantized(tmp_path / "base", adapter=tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        assert torch.equal(logits_of(again), logits_of(model))
    trained = hqqtrain.load_quantized(
        tmp_path / "base", adapter=str(tmp_path / "adapter"), is_trainable=True
    )
    assert trained.training
    assert any(p.requires_grad for p in trained.parameters())


def test_an_adapter_on_another_base_is_refused(quantized, dense, tmp_path: Path):
    hqqtrain.add_lora(quantized, r=2).save_pretrained(tmp_path / "adapter")
    other = type(dense).from_pretrained(small_model())
    hqqtrain.quantize_model(other, nbits=4, solver="rtn")
    hqqtrain.save_quantized(other, tmp_path / "base")
    with pytest.raises(UserError, match=r"^load_quantized: .*trained on the base"):
        hqqtrain.load_quantized(tmp_path / "base", adapter=tmp_path / "adapter")


def test_a_folder_with_files_is_kept(quantized, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"^save_quantized: folder=.*: exists"):
        hqqtrain.save_quantized(quantized, tmp_path / "mine")
    with pytest.raises(UserError, match=r"^save_quantized: folder=.*: has files, but no model"):
        hqqtrain.save_quantized(quantized, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    hqqtrain.save_quantized(quantized, tmp_path / "model")
    hqqtrain.save_quantized(quantized, tmp_path / "model", overwrite=True)
    assert hqqtrain.load_quantized(tmp_path / "model")


def test_the_result_of_a_run_is_not_replaced(quantized, tmp_path: Path):
    folder = tmp_path / "run" / "quantized"
    hqqtrain.save_quantized(quantized, folder)
    before = sorted(folder.rglob("*"))
    for name in ("config.yaml", "status.json"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(
        UserError, match=r"folder=.*quantized: is a result of the run .*run; give another name"
    ):
        hqqtrain.save_quantized(quantized, folder, overwrite=True)
    assert sorted(folder.rglob("*")) == before


def test_damaged_files_are_named(quantized, tmp_path: Path):
    model = hqqtrain.add_lora(quantized, r=2)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    hqqtrain.save_quantized(model, base)
    model.save_pretrained(adapter)
    for file in (adapter / "adapter_model.safetensors", base / "model.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-8])
        with pytest.raises(UserError, match=f"{file}: not a complete safetensors file"):
            hqqtrain.load_quantized(base, adapter=adapter)
        file.unlink()
        with pytest.raises(
            UserError, match=f"{file.parent}: (has no|contains neither) {file.name}"
        ):
            hqqtrain.load_quantized(base, adapter=adapter)
        file.write_bytes(content)


def test_one_of_several_saves_writes_the_folder(quantized, tmp_path: Path):
    def save(_: int) -> str:
        try:
            hqqtrain.save_quantized(quantized, tmp_path / "model", overwrite=True)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(save, range(4)))
    assert "" in errors
    assert all("somebody else writes it now" in error for error in filter(None, errors))
    assert hqqtrain.load_quantized(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"folder=.*/file/x: cannot be written to"):
        hqqtrain.save_quantized(quantized, tmp_path / "file" / "x")


@pytest.mark.parametrize(("arguments", "message"), [
    ({"folder": None}, "folder=None: must be a string"),
    ({"folder": ""}, "folder=: must not be empty"),
    ({"dtype": "nope"}, "dtype=nope: must be auto, fp32, bf16, fp16, or a floating-point dtype"),
    ({"adapter": "nowhere"}, "adapter=nowhere: no such folder"),
    ({"adapter": Path(__file__).parent}, "adapter=.*/api: has no adapter_config.json"),
    ({"dtype": torch.int8}, "dtype=torch.int8: must be auto"),
])  # fmt: skip
def test_arguments_of_another_type(quantized, arguments: dict, message: str, tmp_path: Path):
    hqqtrain.save_quantized(quantized, tmp_path / "model")
    with pytest.raises(UserError, match=f"^load_quantized: {message}"):
        hqqtrain.load_quantized(**{"folder": tmp_path / "model"} | arguments)
    with pytest.raises(UserError, match="model is a int; it must be a module of PyTorch"):
        hqqtrain.save_quantized(5, tmp_path / "x")
    with pytest.raises(UserError, match="tokenizer is a str; it must be a tokenizer"):
        hqqtrain.save_quantized(quantized, tmp_path / "x", "name")


def test_what_is_not_quantized_is_refused(dense, tmp_path: Path):
    with pytest.raises(UserError, match="no quantized layer; call quantize_model"):
        hqqtrain.save_quantized(dense, tmp_path / "a")
    with pytest.raises(UserError, match=r"folder=.*: is dense"):
        hqqtrain.load_quantized(small_model())
    with pytest.raises(UserError, match=r"folder=.*: no such folder"):
        hqqtrain.load_quantized(tmp_path / "nowhere")
    with pytest.raises(UserError, match="only a model of transformers"):
        hqqtrain.save_quantized(nn.Linear(2, 2), tmp_path / "a")


def test_a_model_prepared_for_inference_is_refused(quantized, tmp_path: Path):
    hqqtrain.prepare_for_inference(quantized)
    with pytest.raises(UserError, match="was changed by prepare_for_inference"):
        hqqtrain.save_quantized(quantized, tmp_path / "a")


def test_a_changed_byte_is_found(quantized, tmp_path: Path):
    hqqtrain.save_quantized(quantized, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="checksum differs"):
        hqqtrain.load_quantized(tmp_path / "base")


def test_the_run_of_an_export_is_refused_with_arguments_that_exist(tmp_path: Path):
    (tmp_path / "export" / "adapter").mkdir(parents=True)
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(UserError, match=r"folder=\S*/export adapter=\S*/export/adapter\.$"):
        hqqtrain.load_quantized(tmp_path)
