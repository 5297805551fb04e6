"""A converter like llama.cpp's writes the skeleton of a file, perhaps with other rows first."""

import re
from pathlib import Path

import pytest
import torch
from exports import TOKENS, model_export
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config.export import ExportConfig
from hqqtrain.formats.registry import FORMATS

CONVERTER = """
import sys
import gguf, numpy as np
from safetensors.numpy import load_file

folder, file = sys.argv[1], sys.argv[5]
assert sys.argv[2:5:2] == ["--outtype", "--outfile"]
writer = gguf.GGUFWriter(file, "qwen2")
writer.add_file_type(1)
for name, value in KEYS.items():
    add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
    add(f"qwen2.{name}", value)
writer.add_token_list([f"t{i}" for i in range(96)])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
for name, tensor in load_file(f"{folder}/model.safetensors").items():
    if "down_proj" in name:
        tensor = CHANGE(tensor)
    dtype = np.float32 if tensor.ndim == 1 else np.float16
    name = names.get_name(name, try_suffixes=(".weight", ".bias"))
    writer.add_tensor(name, tensor.astype(dtype))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
KEYS = {
    "context_length": 64, "block_count": 2, "embedding_length": 64, "feed_forward_length": 128,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": 96,
}  # fmt: skip


def _export(make_wide, folder: Path, change: str, **changes) -> Path:
    """Export with a converter that changes the weights of `down_proj`."""
    llama_cpp = folder / "llama.cpp"
    llama_cpp.mkdir()
    script = CONVERTER.replace("CHANGE", f"(lambda tensor: {change})")
    (llama_cpp / "convert_hf_to_gguf.py").write_text(f"KEYS = {KEYS}\n{script}")
    config = ExportConfig(gguf_type="Q4_1", llama_cpp=str(llama_cpp))
    trained = make_wide("qwen2", group_size=32, nbits=4, solver="rtn")
    FORMATS["gguf"].configured(config).write(
        model_export(trained, adapter_form="separate", **changes), folder / "out", _accept
    )
    return folder / "out" / "model-Q4_1.gguf", trained


def _accept(written) -> None:
    assert written.comparison.max_error < 0.01


def test_the_skeleton_becomes_the_file(make_wide, tmp_path):
    file, trained = _export(make_wide, tmp_path, "tensor")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad(), trained.model.disable_adapter():
        torch.testing.assert_close(
            model(TOKENS).logits, trained.model(TOKENS).logits, rtol=1e-2, atol=5e-3
        )
    reader = GGUFReader(file)
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == 96
    assert (
        reader.get_field("general.hqqtrain.fingerprint").contents() == trained.settings.fingerprint
    )
    assert {path.name for path in file.parent.iterdir()} == {"Modelfile", "adapter.gguf", file.name}


def test_another_order_of_rows_is_found(make_wide, tmp_path):
    """The blocks and the adapter follow."""
    file, trained = _export(make_wide, tmp_path, "tensor[::-1]", dtype=torch.float32)
    tensors = {t.name: t for t in GGUFReader(file.with_name("adapter.gguf")).tensors}
    ours = trained.adapter.matrix("model.layers.1.mlp.down_proj", "B")
    theirs = torch.from_numpy(tensors["blk.1.ffn_down.weight.lora_b"].data.copy())
    torch.testing.assert_close(theirs.flip(0), ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tensor * 2", "the converter changes model.layers.0.mlp.down_proj.weight"),
        ("1 / 0", "convert_hf_to_gguf.py cannot convert the model (ZeroDivisionError: division"),
    ],
)
def test_what_is_no_order_of_rows_is_refused(make_wide, tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        _export(make_wide, tmp_path, change)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_the_converter(tmp_path):
    with pytest.raises(UserError, match=r"contains no convert_hf_to_gguf\.py"):
        FORMATS["gguf"].configured(ExportConfig(llama_cpp=str(tmp_path)))
