"""A language model with weights in host memory has the same logits, gradients and replies."""

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config.quant import QuantConfig
from hqqtrain.generation.generator import TextGenerator
from hqqtrain.inference.prepare import prepare_for_inference
from hqqtrain.models.offload import (
    has_host_weights,
    layer_parameters,
    meta_parameters,
    offload_decoder_layers,
    offload_meta,
    offloads_meta,
)
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.nn.replace import quantize_model
from hqqtrain.nn.staging import StagedTensors

CPU = torch.device("cpu")
IDS = torch.arange(14).reshape(2, 7)


def small_model(**settings: int | str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, **settings,
    })  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    quant = QuantConfig(nbits=2, group_size=32, solver="rtn", calibration=None, skip=[])
    quantize_model(model, quant)
    model.get_input_embeddings().requires_grad_(True)
    return model


def outputs_of(model: LlamaForCausalLM, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """Return the logits, and the gradient of the embeddings."""
    model.zero_grad()
    logits = model(ids).logits
    logits.float().square().mean().backward()
    return [logits.detach(), model.get_input_embeddings().weight.grad]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StagedTensors, "copies_on_cpu", True)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_outputs_and_gradients_are_the_same(reentrant: bool | None) -> None:
    model = small_model()
    expected = outputs_of(model)
    offload_meta(model)
    assert offloads_meta(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
    for _ in range(2):
        assert all(map(torch.equal, outputs_of(model), expected))
    with torch.inference_mode():
        assert torch.equal(model.eval()(IDS).logits, expected[0])


@pytest.mark.usefixtures("copies")
def test_merged_linears_are_offloaded_again() -> None:
    plain, offloaded = prepare_for_inference(small_model()), small_model()
    offload_meta(offloaded)
    prepare_for_inference(offloaded)
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, plain(IDS).logits)
    with pytest.raises(UserError, match="backend=torchao: its layers stay on the device"):
        prepare_for_inference(offloaded, "torchao")
    assert all(linear.fetch_meta for linear in offloaded.modules() if hasattr(linear, "W_q"))


@pytest.mark.usefixtures("copies")
def test_decoder_layers_are_copied_layer_by_layer() -> None:
    model = small_model().requires_grad_(False)
    expected = model(IDS).logits
    offload_decoder_layers(model, CPU)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    replies = model.generate(IDS, **options)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(replies, small_model().generate(IDS, **options))


def test_without_a_gpu_the_log_says_that_nothing_happens(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = small_model()
    offload_meta(model)
    assert not offloads_meta(model)
    assert "offload_meta=true: has no effect on a CPU" in caplog.text


def test_which_parameters_stay_on_the_host() -> None:
    model = small_model()
    assert len(meta_parameters(model)) == 2 * (4 * 7 + 1)
    assert len(layer_parameters(model)) == 4 * (7 * 3 + 2)
    assert not has_host_weights(model)
    model.model.norm.to("meta")
    assert has_host_weights(model), "meta stands in for a GPU"


def test_a_model_with_weights_on_the_host_is_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = small_model(), load_tokenizer(TINY_FOLDER)
    model.model.norm.to("meta")
    with pytest.raises(UserError, match=r"generate\.compile=true: weights .* use auto or false"):
        TextGenerator(model, tokenizer, chat=False, compile=True)
    with caplog.at_level("INFO"):
        assert TextGenerator(model, tokenizer, chat=False).compiles is False
    assert "is not compiled" in caplog.text


# The gradients of other implementations of attention are not the same in every pass.
WIDE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 512,
    "attn_implementation": "eager",
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_meta_saves_memory_and_changes_no_bit_on_a_gpu(checkpointing: bool) -> None:
    model, ids = small_model(**WIDE).to(torch.bfloat16).cuda(), IDS.repeat(2, 40).cuda()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    expected = outputs_of(model, ids)
    before = torch.cuda.memory_allocated()
    offload_meta(model)
    gc.collect()
    moved = sum(param.nbytes for param in meta_parameters(model))
    for number in range(20):
        outputs = outputs_of(model, ids)
        assert all(map(torch.equal, outputs, expected)), number
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected[0]), number
    assert before - torch.cuda.memory_allocated() > moved / 2, "two of eight layers are there"
    assert {p.device.type for p in meta_parameters(model.to("cuda"))} == {"cpu"}


@pytest.mark.gpu
def test_decoder_layers_on_the_host_save_memory_and_change_no_bit() -> None:
    model = small_model(**WIDE).to(torch.bfloat16).requires_grad_(False)
    ids, device = IDS.repeat(2, 40).cuda(), torch.device("cuda", 0)
    with torch.no_grad():
        expected = model.to(device)(ids).logits
        before, moved = torch.cuda.memory_allocated(), 0
        for param in layer_parameters(model):
            param.data, moved = param.data.cpu(), moved + param.nbytes
        offload_decoder_layers(model, device)
        for number in range(20):
            assert torch.equal(model(ids).logits, expected), number
        assert before - torch.cuda.memory_allocated() > moved / 2
        assert has_host_weights(model)
