"""A checkpoint gives the same model here and in transformers, whatever its tensors are called."""

import json

import pytest
import torch
from random_models import assert_same_model, load_like_a_run, random_family
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.fqn import expected_shapes, tied_names
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.synthetic import open_weight_source

RENAMED = ("gpt_neox", "exaone", "nemotron_h")
"""Families whose tensors have other names on disk."""

TIED = ("bert", "roberta", "electra", "opt", "gpt_bigcode", "biogpt", "bloom", "gemma2")
"""Families with tied weights and, in BERT's relatives, a tied bias; heads of several names."""


def rewrite(folder, change) -> None:
    """Replace the tensors in `folder` by `change` of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def check_equal(folder) -> PreTrainedModel:
    """Check that the model in `folder` is that of `from_pretrained`, and return it."""
    model = load_like_a_run(folder)
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return model


@pytest.mark.parametrize("kind", [*RENAMED, *TIED])
def test_a_family_loads_as_in_transformers(kind, tmp_path):
    options = {"is_decoder": True} if kind in ("bert", "roberta", "electra") else {}
    if kind == "nemotron_h":
        options = {"layers_block_type": ["attention", "mlp"]}
    random_family(kind, **options).save_pretrained(tmp_path)
    model = check_equal(tmp_path)
    if kind in RENAMED:
        assert load_file(tmp_path / "model.safetensors").keys() != model.state_dict().keys()


@pytest.fixture
def tied(tmp_path):
    """Return the folder of a Llama with tied embeddings."""
    random_family("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    return tmp_path


def test_a_tied_configuration_with_a_head_of_its_own(tied):
    head = torch.randn(96, 32)
    rewrite(tied, lambda tensors: tensors | {"lm_head.weight": head})
    model = check_equal(tied)
    assert torch.equal(model.lm_head.weight, head)
    assert tied_names(model) == {}


def test_a_head_that_equals_the_embeddings_stays_tied(tied):
    name = "model.embed_tokens.weight"
    rewrite(tied, lambda tensors: tensors | {"lm_head.weight": tensors[name].clone()})
    model = check_equal(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reader = open_weight_source(ModelSource("", tied, "dense"), model, torch.device("cpu"))
    assert reader.check(expected_shapes(model)) == []
    assert reader.bytes_read == 0


def test_only_the_head_of_a_tied_model_is_stored(tied):
    def rename(tensors):
        return tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}

    rewrite(tied, rename)
    model = check_equal(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_of_another_shape_is_not_compared(tied):
    rewrite(tied, lambda tensors: tensors | {"lm_head.weight": torch.randn(95, 32)})
    with pytest.raises(UserError, match=r"lm_head\.weight has shape \[95, 32\]"):
        load_like_a_run(tied)


def test_a_bias_of_its_own_is_kept_while_the_weight_stays_tied(tmp_path):
    random_family("bert", is_decoder=True).save_pretrained(tmp_path)
    bias = torch.randn(96)
    rewrite(tmp_path, lambda tensors: tensors | {"cls.predictions.decoder.bias": bias})
    model = check_equal(tmp_path)
    assert tied_names(model).keys() == {"cls.predictions.decoder.weight"}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_prefix_of_the_base_model_may_be_missing(tmp_path, prefix):
    """A checkpoint of `LlamaModel` has no prefix."""
    random_family("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {name.replace("model.", prefix): x for name, x in t.items()})
    check_equal(tmp_path)


def test_a_scalar_parameter_or_buffer_is_loaded(tmp_path):
    """Apertus has scalar buffers and parameters of one element."""
    random_family("apertus").save_pretrained(tmp_path)
    assert any(tensor.dim() == 0 for tensor in load_file(tmp_path / "model.safetensors").values())
    check_equal(tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "hrm_text", "olmo_hybrid"])
def test_merged_and_split_tensors_are_refused_with_advice_that_works(kind, tmp_path):
    random_family(kind).save_pretrained(tmp_path / "stored")
    with pytest.raises(UserError, match=r"transformers computes .* is not supported yet") as caught:
        load_like_a_run(tmp_path / "stored")
    assert "save_original_format=False" in str(caught.value)
    assert "download" not in str(caught.value)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    model.save_pretrained(tmp_path / "as_advised", save_original_format=False)
    check_equal(tmp_path / "as_advised")


def test_a_tensor_that_no_file_contains_is_not_blamed_on_the_download(tmp_path):
    random_family("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"extra.bias": tensors.pop("model.norm.weight")})
    with pytest.raises(UserError, match=r"among them model\.norm\.weight") as caught:
        load_like_a_run(tmp_path)
    assert "extra.bias are not used" in str(caught.value)
    assert "ownload" not in str(caught.value)


def test_a_config_with_more_layers_than_the_checkpoint(tmp_path):
    random_family("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 40
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.layers\.2\..* no file of the folder contains it"):
        load_like_a_run(tmp_path)


def test_8_bit_floats_are_read_as_bfloat16(tmp_path):
    random_family("llama").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    model = load_like_a_run(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")[name]
    assert torch.equal(model.get_parameter(name), stored.float())
    reader = open_weight_source(ModelSource("", tmp_path, "dense"), model, torch.device("cpu"))
    reader.read(name)
    assert (reader.dtype(name), reader.bytes_read) == (torch.bfloat16, stored.numel())


def test_no_memory_stays_uninitialized(tmp_path, monkeypatch):
    """A buffer that neither the checkpoint nor the constructor fills is refused by name."""
    random_family("llama").save_pretrained(tmp_path)
    model = build_meta(load_hf_config(tmp_path), torch.float32)
    model.model.layers[0].register_buffer("mask", nn.Buffer(torch.ones(2, device="meta")), False)
    monkeypatch.setattr("random_models.build_meta", lambda *_: model)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mask has no values after loading"):
        load_like_a_run(tmp_path)
