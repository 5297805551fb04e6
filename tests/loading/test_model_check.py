"""Models that cannot be run as causal language models are refused by name, others are not."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import FAMILY_SIZES, random_family
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import EvalConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.loading.model_check import check_runnable, check_stored_dtypes
from hqqtrain.models.build import build_meta
from hqqtrain.models.fqn import expected_shapes
from hqqtrain.models.source import TINY_FOLDER, ModelSource
from hqqtrain.models.weights.synthetic import open_weight_source


@pytest.mark.parametrize(
    ("kind", "length"),
    [("opt", 64), ("gpt_bigcode", 64), ("bert", 64), ("roberta", 63), ("biogpt", 64), ("gptj", 64)],
)
def test_a_sequence_ends_within_the_table_of_positions(kind, length):
    options = {"is_decoder": True} if kind in ("bert", "roberta") else {}
    if kind == "gptj":
        options = {"rotary_dim": 8}
    model = random_family(kind, **options)
    check_runnable(model, length)
    with torch.no_grad():
        model(input_ids=torch.full((1, length), 5), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, length + 1), 5), use_cache=False)
    with pytest.raises(UserError, match=rf"max_seq_len={length + 1}.*max_seq_len={length} or less"):
        check_runnable(model, length + 1)


def test_a_model_with_computed_positions_is_only_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        check_runnable(random_family("llama"), 65)
    assert "train.max_seq_len=65: the model was made for 64 tokens at most" in caplog.text
    assert "use train.max_seq_len=64 or less" in caplog.text


def test_the_bundled_model_knows_the_length_that_it_was_trained_on(caplog):
    """Its perplexity is 8 at 512 tokens, and worse with every token more."""
    script = (Path(__file__).parents[2] / "scripts" / "pretrain_tiny.py").read_text()
    assert '"tiny": Size(4096, 256, 768, 6, 4, context=512,' in script
    model = build_meta(AutoConfig.from_pretrained(TINY_FOLDER))
    with caplog.at_level(logging.WARNING):
        check_runnable(model, 512)
        assert not caplog.records
        check_runnable(model, RunConfig().train.max_seq_len)
    assert "train.max_seq_len=2048: the model was made for 512 tokens at most" in caplog.text


def test_the_windows_of_a_protocol_must_fit_the_model():
    tiny = build_meta(AutoConfig.from_pretrained(TINY_FOLDER))
    fits = build_meta(
        AutoConfig.for_model("llama", **FAMILY_SIZES | {"max_position_embeddings": 2048})
    )
    table = random_family("opt", max_position_embeddings=1500)
    for protocol in ("wikitext2_2048", "hqq"):
        evaluation = EvalConfig(protocol=protocol)
        check_runnable(fits, 64, evaluation=evaluation)
        check_runnable(tiny, 64, evaluation=replace(evaluation, source=None))
        message = rf"eval.protocol={protocol}: .* made for 512 tokens at most .*=windows\."
        with pytest.raises(UserError, match=message):
            check_runnable(tiny, 64, evaluation=evaluation)
    check_runnable(tiny, 64, evaluation=EvalConfig())
    check_runnable(table, 64, evaluation=EvalConfig(protocol="hqq"))
    with pytest.raises(UserError, match=r"for 1500 tokens at most .*=windows or hqq\."):
        check_runnable(table, 64, evaluation=EvalConfig(protocol="wikitext2_2048"))


def test_a_model_without_activation_checkpointing():
    model = random_family("ctrl", n_embd=32, n_layer=1, n_head=2, dff=48)
    check_runnable(model, 8)
    with pytest.raises(UserError, match="CTRLLMHeadModel does not support it"):
        check_runnable(model, 8, activation_checkpointing="full")
    check_runnable(model, 8, activation_checkpointing="auto")


def test_a_number_of_recomputed_layers_that_the_model_does_not_have():
    model = random_family("llama")
    layers = model.config.num_hidden_layers
    check_runnable(model, 8, activation_checkpointing=layers)
    with pytest.raises(UserError, match=rf"checkpointing={layers + 1}: the model has {layers} "):
        check_runnable(model, 8, activation_checkpointing=layers + 1)
    with pytest.raises(UserError, match=r"checkpointing=1: .* does not support it; set .*=none"):
        check_runnable(
            random_family("ctrl", n_embd=32, n_layer=1, n_head=2, dff=48), 8,
            activation_checkpointing=1,
        )  # fmt: skip


def check_stored(folder, added: dict[str, torch.Tensor]) -> None:
    """Check the dtypes of a stored Llama with the tensors `added` or replaced."""
    random_family("llama").save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | added, file, {"format": "pt"})
    model = build_meta(AutoConfig.from_pretrained(folder))
    reader = open_weight_source(ModelSource("", folder, "dense"), model, torch.device("cpu"))
    check_stored_dtypes(model, reader, reader.check(expected_shapes(model)))


WEIGHT = "model.layers.0.mlp.up_proj.weight"


def test_integers_are_no_weights(tmp_path):
    with pytest.raises(UserError, match=r"up_proj\.weight is stored as torch\.int8"):
        check_stored(tmp_path, {WEIGHT: torch.zeros(48, 32, dtype=torch.int8)})


def test_scales_of_8_bit_floats_are_not_dropped(tmp_path):
    weight = {WEIGHT: torch.zeros(48, 32).to(torch.float8_e4m3fn)}
    check_stored(tmp_path, weight)
    with pytest.raises(UserError, match=r"up_proj\.weight_scale_inv.*quantized already"):
        check_stored(tmp_path, weight | {f"{WEIGHT}_scale_inv": torch.ones(1, 1)})


def test_a_tensor_named_scale_is_only_unused_in_other_dtypes(tmp_path):
    check_stored(tmp_path, {"extra.scale": torch.ones(1)})
