"""Tokens that are added to a base model are trained, saved, exported and resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.tasks.export import export
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.inference import evaluate

CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That, {}."}]
TOKENS = ["<|im_start|>", "<|im_end|>"]
IDS = [4096, 4097]


ONCE_TIED = pytest.mark.parametrize("base", ["tied"], indirect=True)
ONCE_UNTIED = pytest.mark.parametrize("base", ["untied"], indirect=True)


@pytest.fixture(params=["tied", "untied", "own head"])
def base(request, tmp_path: Path) -> Path:
    """Return the folder of a random Llama whose tokenizer lacks the markers of chatml."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=request.param != "untied",
    )  # fmt: skip
    folder = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    if request.param == "own head":  # in spite of the tie in config.json
        file = folder / "model.safetensors"
        head = {"lm_head.weight": torch.randn(4096, 32) / 50}
        save_file(load_file(file) | head, file, {"format": "pt"})
    for file in TINY_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict:
    rows = [
        json.dumps({"messages": [CHAT[0], {**CHAT[1], "content": f"That, {i}."}]})
        for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    return {
        "model": {"name_or_path": str(base)},
        "data": {
            "source": str(tmp_path / "chats.jsonl"), "chat_template": "chatml",
            "add_tokens": "auto",
        },
        "eval": {"source": "auto", "reference": "off", "samples": 0},
        "optim": {"lr": 0.05},
        "adapter": {"modules_to_save": ["model.norm"]},
    }  # fmt: skip


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[*IDS, 5, IDS[0], 77]])).logits


def test_stock_peft_on_the_exported_base_equals_the_merged_export(
    base, settings, make_config, start_run, tmp_path
):
    with start_run(make_config(**settings)) as run:
        finetune(run)
        folder = run.layout.folder
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"].double().mean(0)
    assert (adapter[name] - before).abs().min(dim=1).values.max() > 0.01  # trained, both rows
    assert not torch.equal(adapter["base_model.model.model.norm.weight"], torch.ones(32))
    for saved in ("adapter", "quantized"):
        tokenizer = AutoTokenizer.from_pretrained(folder / saved)
        assert tokenizer.convert_tokens_to_ids(TOKENS) == IDS
        text = tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert text.startswith("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThat")
    exports = {}
    for kind, model in (("base", folder / "quantized"), ("merged", folder)):
        config = make_config("export", model={"name_or_path": str(model)}, run={"name": kind})
        with start_run(config) as run:
            export(run)
            exports[kind] = run.layout.export
    plain = AutoModelForCausalLM.from_pretrained(exports["base"])
    assert plain.get_input_embeddings().num_embeddings == 4098
    unadapted = _logits(plain)
    stock = PeftModel.from_pretrained(plain, folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(exports["merged"])
    torch.testing.assert_close(_logits(stock), _logits(merged), atol=1e-4, rtol=1e-4)
    assert (unadapted - _logits(merged)).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(exports["merged"]).convert_tokens_to_ids(TOKENS) == IDS


@ONCE_TIED
def test_a_resumed_run_has_the_same_bits(settings, make_config, start_run):
    def train(name: str, steps: int) -> dict[str, torch.Tensor]:
        config = make_config(**settings, run={"name": name}, train={"max_steps": steps})
        with start_run(config) as run:
            finetune(run)
        return load_file(run.layout.adapter / "adapter_model.safetensors")

    straight = train("straight", 3)
    train("resumed", 1)
    resumed = train("resumed", 3)
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


@ONCE_UNTIED
def test_training_continues_from_the_run_and_evaluates_it(settings, make_config, start_run):
    with start_run(make_config(**settings)) as run:
        finetune(run)
    losses = run.recorder.summary.content.eval.final
    settings["model"] = {"name_or_path": str(run.layout.folder)}
    with start_run(make_config("eval", **settings, run={"name": "measured"})) as measured:
        evaluate(measured)
    again = measured.recorder.summary.content.eval.final
    assert again.perplexity == pytest.approx(losses.perplexity, rel=1e-5)
    with start_run(make_config(**settings, run={"name": "second"})) as second:
        finetune(second)
    config = json.loads((second.layout.adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"]["model.embed_tokens"] == IDS
    assert config["modules_to_save"] == ["model.norm"]


@ONCE_UNTIED
def test_a_base_without_the_rows_is_refused(base, settings, make_config, start_run):
    with start_run(make_config(**settings)) as run:
        finetune(run)
    settings |= {"data": {"source": settings["data"]["source"], "chat_template": "chatml"}}
    init = {"adapter": {"init_from": str(run.layout.adapter), "modules_to_save": ["model.norm"]}}
    config = make_config(**{**settings, **init}, run={"name": "second"})
    with start_run(config) as run, pytest.raises(UserError, match=r"only 4096 rows.*data.add_tok"):
        finetune(run)
