"""transformers reads our GGUF files and computes our logits."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import small_model
from exports import TOKENS, layers, model_export
from foreign_models import dequantized, open_folder
from gguf import GGUFReader
from quantized_models import TrainedModel, trained_model
from spm_tokenizers import save_spm_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hqqtrain.common.errors import UserError
from hqqtrain.config.export import ExportConfig
from hqqtrain.formats.base import WrittenModel
from hqqtrain.formats.exported_model import exported_model
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.formats.registry import FORMATS, check_format
from hqqtrain.models.source import TINY_FOLDER

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 384,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
GEMMA = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 8}


def _trained(kind: str, folder: Path, sizes: dict | None = None, **quant) -> TrainedModel:
    """Return a small model whose norms and biases matter, with rows of 256 and 512."""
    model = small_model(AutoConfig.for_model(kind, **WIDE | (sizes or {})))
    for param in model.parameters():
        if param.dim() == 1:
            torch.nn.init.uniform_(param, 0.2, 1.0)
    trained = trained_model(model, folder / "source", **{"group_size": 64, "solver": "rtn"} | quant)
    save_spm_tokenizer(trained.source)  # a small one, because files with long lists load slowly
    return trained


def _write(trained, folder, block_type: str = "auto", **changes) -> tuple[WrittenModel, Path]:
    """Write an export and return what the format says, and the file."""
    found: list[WrittenModel] = []
    export_format = FORMATS["gguf"].configured(ExportConfig(gguf_type=block_type))
    export_format.write(model_export(trained, **changes), folder, found.append)
    return found[0], next(f for f in folder.glob("*.gguf") if f.name != "adapter.gguf")


@torch.no_grad()
def _kl(trained, file: Path, *, adapted: bool = False) -> float:
    """Return KL(ours || transformers' model of the file) in nats per token."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    theirs = model(TOKENS).logits.log_softmax(-1)
    if adapted:
        ours = trained.model(TOKENS).logits.log_softmax(-1)
    else:
        with trained.model.disable_adapter():
            ours = trained.model(TOKENS).logits.log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("kind", "nbits", "block_type", "name", "kl", "error"),
    [
        ("llama", 8, "auto", "Q8_0", 1e-3, 2), ("llama", 4, "auto", "Q4_K", 1e-3, 0.2),
        ("llama", 4, "Q4_1", "Q4_1", 1e-5, 0.01), ("llama", 3, "auto", "Q4_K", 1e-3, 0.1),
        ("llama", 2, "auto", "Q2_K", 5e-2, 0.2), ("llama", 2, "Q4_1", "Q4_1", 1e-5, 0.002),
        ("llama", 1, "auto", "Q2_K", 5e-2, 0.1), ("llama", 2, "Q8_0", "Q8_0", 1e-3, 0.1),
        ("qwen2", 4, "Q4_1", "Q4_1", 1e-5, 0.01),
    ],
)  # fmt: skip
def test_transformers_computes_our_logits(tmp_path, kind, nbits, block_type, name, kl, error):
    trained = _trained(kind, tmp_path, nbits=nbits)
    written, file = _write(trained, tmp_path / "out", block_type)
    assert file.name == f"model-{name}.gguf"
    assert _kl(trained, file) < kl
    assert 0 < written.comparison.max_error < error
    assert len(written.comparison.layers) == 7


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_gemma(tmp_path, kind):
    """Norms have an offset; the head of Gemma 3 may be quantized apart from the embedding."""
    trained = _trained(kind, tmp_path, GEMMA, nbits=4)
    assert _kl(trained, _write(trained, tmp_path / "out", "Q4_1")[1]) < 1e-5


def test_the_bundled_model_and_its_tokenizer(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    trained = trained_model(model, tmp_path / "source", nbits=4, group_size=64, solver="rtn")
    file = _write(trained, tmp_path / "out")[1]
    assert _kl(trained, file) < 5e-3
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "def add(a, b):\n    return a + 12345  # it's\n"
    assert theirs(text).input_ids == AutoTokenizer.from_pretrained(TINY_FOLDER)(text).input_ids


def test_an_adapter_is_merged_before_weights_are_rounded(tmp_path):
    trained = _trained("llama", tmp_path, nbits=8)
    written, file = _write(trained, tmp_path / "out", adapter_form="merge")
    assert _kl(trained, file, adapted=True) < 5e-3 < _kl(trained, file)
    assert written.comparison.relative_error < 1e-4


@pytest.mark.parametrize(
    ("nbits", "block_type"), [(4, "Q4_K"), (4, "Q4_1"), (2, "Q2_K"), (8, "Q8_0")]
)
def test_the_kl_is_measured_without_dense_weights(tmp_path, nbits, block_type):
    trained = _trained("llama", tmp_path, nbits=nbits)
    logits: list[torch.Tensor] = []

    def accept(written: WrittenModel) -> None:
        with trained.model.disable_adapter(), torch.no_grad():
            exported = exported_model(trained.model, written.read_layer)
            with exported.disable_adapter():
                logits.append(exported(TOKENS).logits)

    export_format = FORMATS["gguf"].configured(ExportConfig(gguf_type=block_type))
    export_format.write(model_export(trained, dtype=torch.float32), tmp_path / "out", accept)
    file = tmp_path / "out" / f"model-{block_type}.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the dense tensors of a file."""
    kinds = ("F32", "F16")
    found = (t for t in GGUFReader(file).tensors if t.tensor_type.name in kinds)
    return {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in found}


def _key(file: Path, key: str):
    return GGUFReader(file).get_field(key).contents()


def test_a_separate_adapter(tmp_path):
    """llama.cpp computes alpha / rank * B A; the rows of B are in the order of the base."""
    trained = _trained("llama", tmp_path)
    first = trained.adapter.modules[0]
    config = replace(trained.adapter.config, alpha_pattern={first: 2})
    changed = replace(trained.adapter, config=config)
    file = _write(trained, tmp_path / "out", adapter=changed, adapter_form="separate",
                  dtype=torch.float32)[1]  # fmt: skip
    path = tmp_path / "out" / "adapter.gguf"
    assert _key(path, "general.type") == "adapter"
    assert _key(path, "general.architecture") == "llama"
    assert _key(path, "adapter.type") == "lora"
    assert _key(path, "general.hqqtrain.fingerprint") == trained.settings.fingerprint
    alpha, tensors = _key(path, "adapter.lora.alpha"), _tensors(path)
    assert len(tensors) == 2 * len(changed.modules)
    for module, name in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down"),
                         ("self_attn.k_proj", "attn_k")):  # fmt: skip
        A, B = (tensors[f"blk.0.{name}.weight.lora_{x}"] for x in "ab")
        delta = changed.delta(f"model.layers.0.{module}")
        if "attn" in name:  # pairs of neighbors, which were halves of a head of 64
            delta = delta.view(-1, 2, 32, delta.shape[1]).transpose(1, 2).reshape(delta.shape)
        torch.testing.assert_close(alpha / len(A) * (B @ A), delta)
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile == f"FROM ./{file.name}\nADAPTER ./adapter.gguf\n"


def test_what_an_adapter_trained_of_the_base_goes_into_the_base(tmp_path):
    trained = _trained("llama", tmp_path)
    name = "base_model.model.model.norm.weight"
    adapter = replace(
        trained.adapter, state=trained.adapter.state | {name: torch.full((256,), 3.0)}
    )
    for form, expected in (("separate", [3.0]), ("none", None)):
        file = _write(trained, tmp_path / form, adapter=adapter, adapter_form=form)[1]
        norm = _tensors(file)["output_norm.weight"]
        assert (norm.unique().tolist() == [3.0]) == (expected == [3.0])


def test_mixed_bits_and_a_quantized_head_that_was_tied(tmp_path):
    model = small_model(AutoConfig.for_model("llama", **WIDE, tie_word_embeddings=True))
    overrides = {"*down_proj": {"nbits": 8}, "lm_head": {"nbits": 4}}
    trained = trained_model(model, tmp_path / "source", group_size=64, solver="rtn", skip=[],
                            overrides=overrides)  # fmt: skip
    save_spm_tokenizer(trained.source)
    _, file = _write(trained, tmp_path / "out", name="mine")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert file.name == "mine-Q2_K.gguf"
    assert kinds["output.weight"] == "Q4_K"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert (kinds["token_embd.weight"], kinds["output_norm.weight"]) == ("F16", "F32")
    assert _key(file, "general.hqqtrain.fingerprint") == trained.settings.fingerprint
    assert _kl(trained, file) < 5e-2


def test_our_files_can_be_taken_over(tmp_path, monkeypatch):
    """The import of an export has the weights of the export, in the order of the checkpoint."""
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "cache"))
    trained = _trained("llama", tmp_path, nbits=4)
    reader = open_folder(_write(trained, tmp_path / "out", "Q4_1")[1])
    for name, layer in layers(trained).items():
        ours = layer.dequantize(torch.float32)
        steps = layer.scale.float().max()
        assert (dequantized(reader, name, torch.float32) - ours).abs().max() < 0.01 * steps


def test_a_refused_export_leaves_nothing(tmp_path):
    trained = _trained("llama", tmp_path)

    def refuse(written: WrittenModel) -> None:
        raise UserError("too far")

    with pytest.raises(UserError, match="too far"):
        FORMATS["gguf"].write(model_export(trained), tmp_path / "out", refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_scales_that_fp16_cannot_hold_are_refused(tmp_path):
    trained = _trained("llama", tmp_path)
    layers(trained)["model.layers.0.mlp.up_proj"].scale.data[3, 1] = 1e-6
    with pytest.raises(UserError, match=r"up_proj: has a scale of .*e-0[67].*gguf_type=Q8_0"):
        _write(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _write(trained, tmp_path / "out", "Q8_0")


def test_five_bits_for_two_are_pointed_out(tmp_path, caplog):
    trained = _trained("llama", tmp_path, {"intermediate_size": 320})
    with caplog.at_level(logging.WARNING):
        written = _write(trained, tmp_path / "out")[0]
    assert "1 layers take 5 bits per weight (Q4_1)" in caplog.text
    assert 2.625 < written.comparison.bits_per_weight < 5


@pytest.mark.parametrize(
    ("quant", "block_type", "message"),
    [
        (
            {"axis": 0},
            "auto",
            r"quant\.axis=0\), which Q4_1 cannot hold \(export\.gguf_type=Q8_0 can",
        ),
        ({"group_size": 8}, "auto", "no multiple of 32, which Q4_1 cannot hold"),
        ({"nbits": 4}, "Q2_K", "has 4 bits, which Q2_K cannot hold"),
    ],
)
def test_what_gguf_cannot_hold(tmp_path, quant, block_type, message):
    trained = _trained("llama", tmp_path, **quant)
    config = ExportConfig(gguf_type=block_type)
    with pytest.raises(UserError, match=f"export.format=gguf: .*{message}"):
        check_format("gguf", trained.settings, trained.hf_config, config)


@pytest.mark.parametrize(
    ("nbits", "block_type", "asked", "form"),
    [
        (8, "auto", "auto", "merge"), (8, "auto", "separate", "separate"),
        (4, "auto", "auto", "separate"), (2, "Q8_0", "merge", "merge"), (4, "auto", "merge", None),
    ],
)  # fmt: skip
def test_only_eight_bits_merge_the_adapter(make_wide, tmp_path, nbits, block_type, asked, form):
    export_format = FORMATS["gguf"].configured(ExportConfig(gguf_type=block_type))
    settings: QuantizedSettings = make_wide(nbits=nbits, group_size=32, solver="rtn").settings
    if form:
        assert export_format.adapter_form(asked, tmp_path, settings) == form
    else:
        with pytest.raises(UserError, match=r"export\.gguf_type=Q8_0 merges it"):
            export_format.adapter_form(asked, tmp_path, settings)
