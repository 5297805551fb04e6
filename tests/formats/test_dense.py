"""The exported checkpoint is an ordinary model with the outputs of base and adapter."""

import json
import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.dense import dense_tensors
from hqqtrain.formats.packed import model_tensors
from hqqtrain.formats.peft import Adapter, load_adapter
from hqqtrain.formats.targets.dense import DenseFormat

TOKENS = torch.arange(24).view(2, 12)


def _export(trained, folder, *, adapter=True, dtype=torch.float32, **more):
    export = ModelExport(
        model=trained.model, settings=trained.settings, hf_config=trained.hf_config,
        tokenizer=trained.source, source_dtype=lambda name: None, adapter_form="merge",
        adapter=trained.adapter if adapter is True else adapter, dtype=dtype, **more,
    )  # fmt: skip
    DenseFormat().write(export, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize(
    ("kind", "tied", "quant", "adapter"),
    [
        ("llama", False, {}, AdapterConfig(r=4, alpha=8)),
        ("llama", True, {"axis": 0}, AdapterConfig(kind="rslora", r=4, alpha=8)),
        ("qwen2", True, {"nbits": 3, "group_size": None}, AdapterConfig(r=1, alpha=3)),
        (
            "qwen2",
            False,
            {"overrides": {"*.k_proj": None}},
            AdapterConfig(target_modules=["*.v_proj"]),
        ),
        ("llama", True, {"skip": []}, AdapterConfig(target_modules=["*_proj"])),
        ("llama", True, {"skip": []}, AdapterConfig(target_modules=["*"])),
    ],
)
def test_exported_models_compute_the_same_logits(
    make_trained, tmp_path, kind, tied, quant, adapter
):
    trained = make_trained(kind, tied=tied, adapter=adapter, **quant)
    dense = _export(trained, tmp_path / "dense")
    torch.testing.assert_close(dense(TOKENS).logits, trained.model(TOKENS).logits)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] == (tied and "skip" not in quant)


def test_export_without_an_adapter_is_the_base(make_trained, tmp_path):
    trained = make_trained()
    dense = _export(trained, tmp_path / "dense", adapter=None)
    with trained.model.disable_adapter():
        torch.testing.assert_close(dense(TOKENS).logits, trained.model(TOKENS).logits)


def test_an_export_has_several_files_and_a_tokenizer(make_trained, tmp_path):
    trained = make_trained()
    trained.save_adapter(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    dense = _export(trained, tmp_path / "dense", adapter=adapter, max_shard_bytes=10_000)
    torch.testing.assert_close(dense(TOKENS).logits, trained.model(TOKENS).logits)
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    assert AutoTokenizer.from_pretrained(tmp_path / "dense").vocab_size == 4096


def test_merging_rounds_once(make_trained, tmp_path):
    """A bf16 export sums the dequantized weight and the delta in fp32 and casts once."""
    trained = make_trained()
    dense = _export(trained, tmp_path / "dense", dtype=torch.bfloat16)
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    name = "model.layers.1.mlp.down_proj"
    layer = trained.model.get_base_model().get_submodule(name)
    exact = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default")
    assert torch.equal(dense.get_parameter(f"{name}.weight"), exact.bfloat16())
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tensors_are_streamed(make_trained):
    """At most the three tensors of a layer are read ahead of each yielded weight."""
    trained, taken = make_trained(), []

    def recorded():
        for name, tensor in model_tensors(trained.model):
            taken.append(name)
            yield name, tensor

    stream = dense_tensors(recorded(), trained.settings, dtype=torch.float32)
    for count, _ in enumerate(stream, 1):
        assert len(taken) <= 3 * count


def test_another_base_is_refused_before_anything_is_written(make_trained, tmp_path):
    trained = make_trained()
    stranger = Adapter(trained.adapter.config, trained.adapter.state, "sha256:other")
    with pytest.raises(UserError, match="trained on the base sha256:other"):
        _export(trained, tmp_path / "dense", adapter=stranger)
    assert os.listdir(tmp_path) == ["source"]


def test_an_adapter_of_another_model_is_refused(make_trained, tmp_path):
    trained = make_trained()
    state = {k.replace("layers.1", "layers.9"): v for k, v in trained.adapter.state.items()}
    stranger = Adapter(trained.adapter.config, state)
    with pytest.raises(
        UserError, match=r"model\.layers\.9\..*not a quantized linear layer of this base"
    ):
        _export(trained, tmp_path / "dense", adapter=stranger)


def test_a_value_beyond_the_range_of_the_dtype_is_refused(make_trained):
    trained = make_trained()

    def export(value: float) -> list[tuple[str, torch.Tensor]]:
        stream = [("model.norm.weight", torch.full((3,), value))]
        return list(dense_tensors(stream, trained.settings, dtype=torch.float16))

    assert export(65504)[0][1][0] == 65504
    assert export(float("-inf"))[0][1][0] == float("-inf")  # as the model has it
    with pytest.raises(UserError, match=r"model\.norm\.weight: has the value 100000, .*float16"):
        export(1e5)


def test_an_adapter_that_makes_a_weight_infinite_is_not_merged(make_trained, tmp_path):
    trained = make_trained()
    state = {name: torch.full_like(tensor, 1e38) for name, tensor in trained.adapter.state.items()}
    with pytest.raises(UserError, match=r"infinite or NaN once the adapter is merged"):
        _export(trained, tmp_path / "dense", adapter=replace(trained.adapter, state=state))
    assert not (tmp_path / "dense").exists()
