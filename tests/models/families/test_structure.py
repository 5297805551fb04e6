"""The text model is found in every wrapping, also next to a vision tower with more layers."""

import logging

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BltConfig,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    ModernBertDecoderConfig,
    PretrainedConfig,
    Qwen2VLConfig,
    SiglipVisionConfig,
)

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.strategies.fsdp2 import FSDP2
from hqqtrain.models.families.registry import FAMILIES, inspect_layer, layer_names
from hqqtrain.models.families.structure import (
    decoder_layers,
    describe_decoder_layers,
    find_decoder_layers,
    input_embeddings,
    output_head,
    text_backbone,
    text_config,
)
from hqqtrain.nn.lora import lora_config
from hqqtrain.nn.replace import quantize_model

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def on_meta(config: PretrainedConfig, auto: type = AutoModelForCausalLM) -> nn.Module:
    with torch.device("meta"):
        return auto.from_config(config)


def llama() -> nn.Module:
    return on_meta(LlamaConfig(**TEXT, tie_word_embeddings=False))


def vision_language_models() -> list:
    gemma = Gemma3Config(
        text_config=TEXT | {"layer_types": ["full_attention"] * 2},
        vision_config=SiglipVisionConfig(**VISION).to_dict(),
    )
    llava = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    qwen = Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={"depth": 5, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
    )
    return [
        pytest.param(gemma, AutoModelForCausalLM, "Gemma3DecoderLayer", id="gemma3"),
        pytest.param(llava, AutoModelForImageTextToText, "LlamaDecoderLayer", id="llava"),
        pytest.param(qwen, AutoModelForImageTextToText, "Qwen2VLDecoderLayer", id="qwen2_vl"),
    ]


@pytest.mark.parametrize(("config", "auto", "layer_class"), vision_language_models())
def test_a_longer_vision_tower_is_not_the_text_model(config, auto, layer_class):
    model = on_meta(config, auto)
    longest = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    assert len(longest) == 5, "the vision tower has to be longer than the text model"
    assert decoder_layers(model) is model.model.language_model.layers
    assert describe_decoder_layers(model) == f"2 x {layer_class} at model.language_model.layers"
    assert text_backbone(model) is model.model.language_model
    assert text_config(model) is model.config.text_config
    assert input_embeddings(model) is model.model.language_model.embed_tokens
    assert output_head(model) is model.lm_head
    for layer in decoder_layers(model):
        assert layer_names(model, layer) == inspect_layer(layer) == FAMILIES["llama"]


def test_every_part_of_a_plain_model():
    model = llama()
    assert decoder_layers(model) is model.model.layers
    assert text_backbone(model) is model.model
    assert text_config(model) is model.config
    assert input_embeddings(model) is model.model.embed_tokens
    assert output_head(model) is model.lm_head


def test_quantized_linears_and_adapters_change_nothing():
    model = llama()
    layers, embeddings, head = model.model.layers, model.model.embed_tokens, model.lm_head
    quantize_model(model, QuantConfig(group_size=16))
    peft = get_peft_model(model, lora_config(AdapterConfig(r=2), model), low_cpu_mem_usage=True)
    for wrapped in (peft, nn.Sequential(peft)):
        assert decoder_layers(wrapped) is layers
        assert input_embeddings(wrapped) is embeddings
        assert output_head(wrapped) is head
        assert text_config(wrapped) is model.config
        assert describe_decoder_layers(wrapped) == "2 x LlamaDecoderLayer at model.layers"


def test_a_model_without_head():
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**TEXT))
    assert output_head(model) is None
    assert decoder_layers(model) is model.layers
    assert text_backbone(model) is model


def test_transformers_get_decoder_is_not_the_backbone_of_modernbert():
    """Its attribute `decoder` is the output head."""
    config = ModernBertDecoderConfig(
        **{k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")},
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = on_meta(config)
    assert isinstance(model.get_decoder(), nn.Linear)
    assert text_backbone(model) is model.model
    assert decoder_layers(model) is model.model.layers


def test_byte_latent_transformers_have_most_layers_outside_of_the_part_with_the_embeddings():
    model = on_meta(BltConfig())
    assert find_decoder_layers(model) is model.model.global_transformer.layers


class MadeUp(nn.Module):
    """A module that transformers does not know, with lists of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList([nn.Linear(2, 2)])
        self.tower = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        self.empty = nn.ModuleList()


def test_an_unknown_module_has_its_longest_list():
    model = MadeUp()
    assert decoder_layers(model) is model.tower
    assert describe_decoder_layers(model) == "3 x Linear at tower"
    assert text_backbone(model) is model
    assert input_embeddings(model) is None


def test_the_number_of_layers_decides_between_lists():
    """Experts may be a longer list than the layers, and other stacks may be next to them."""
    model = llama()
    model.model.extra = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
    assert decoder_layers(model) is model.model.layers
    model.config.num_hidden_layers = 48  # some count something else than modules
    assert decoder_layers(model) is model.model.extra


def test_a_model_without_layers_is_refused():
    assert find_decoder_layers(nn.Sequential(nn.Linear(2, 2))) is None
    for model in (nn.Linear(2, 2), nn.Sequential(nn.ModuleList())):
        with pytest.raises(UserError, match=r"no list of decoder layers.*parallel\.strategy=ddp"):
            decoder_layers(model)


def test_sharding_says_what_it_takes_for_layers(caplog):
    comm = Communicator(0, 1, torch.device("cpu"))
    with caplog.at_level(logging.INFO, logger="hqqtrain"):
        FSDP2(comm).shard(llama())
    (record,) = caplog.records
    assert "decoder layers: 2 x LlamaDecoderLayer at model.layers, sharded" in record.message
