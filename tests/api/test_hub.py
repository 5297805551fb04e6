"""`push_to_hub`, and the `push_to_hub` of transformers and PEFT on our models."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import hqqtrain
from hqqtrain.common.errors import UserError

TOKENS = torch.arange(16).view(2, 8)


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_folders_of_a_model_and_its_adapter(hub, quantized, tokenizer, tmp_path):
    expected = _logits(quantized)
    hqqtrain.save_quantized(quantized, tmp_path / "base", tokenizer)
    adapted = hqqtrain.add_lora(quantized, r=2, target_modules=["q_proj"])
    with torch.no_grad():
        adapted.get_parameter(
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
        ).fill_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    url = hqqtrain.push_to_hub(tmp_path / "base", "alice/small-base", base="meta/base")
    assert url == f"{hub.url}/alice/small-base"
    card = hub.text("alice/small-base", "README.md")
    assert "base_model: meta/base" in card
    assert "2, groups of 32, axis 1, solver `rtn`" in card
    hqqtrain.push_to_hub(tmp_path / "adapter", "alice/small")
    assert all(repo.private for repo in hub.repos.values())
    base = AutoModelForCausalLM.from_pretrained("alice/small-base")
    assert torch.equal(_logits(base), expected)
    loaded = PeftModel.from_pretrained(base, "alice/small")
    assert torch.equal(_logits(loaded), _logits(adapted))
    with pytest.raises(UserError, match=r"^push_to_hub: name=alice/x, with meta/base: trained on"):
        hqqtrain.push_to_hub(tmp_path / "adapter", "alice/x", base="meta/base")


def test_an_export(hub, quantized, tokenizer, tmp_path):
    hqqtrain.export(quantized, tmp_path / "mlx", "mlx", tokenizer)
    hqqtrain.push_to_hub(tmp_path / "mlx", "alice/mlx", private=False)
    assert not hub.repos["alice/mlx"].private
    assert "mlx_lm.generate --model alice/mlx" in hub.text("alice/mlx", "README.md")


def test_the_dense_base_of_a_run_must_be_on_the_hub(hub, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    config = {"base_model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^push_to_hub: base=None: the base of .* not on the Hub"):
        hqqtrain.push_to_hub(tmp_path / "run", "alice/tuned")


def test_the_method_of_transformers_and_of_peft(hub, quantized):
    assert quantized.push_to_hub("alice/stock", private=True)
    base = AutoModelForCausalLM.from_pretrained("alice/stock")
    assert torch.equal(_logits(base), _logits(quantized))
    adapted = hqqtrain.add_lora(quantized, r=2, target_modules=["q_proj"])
    adapted.push_to_hub("alice/stock-adapter", private=True)
    loaded = PeftModel.from_pretrained(base, "alice/stock-adapter")
    assert torch.equal(_logits(loaded), _logits(adapted))
    other = AutoModelForCausalLM.from_pretrained("alice/stock")
    layer = other.get_submodule("model.layers.0.self_attn.q_proj")
    layer.scale.data += 1
    del other.config.quantization_config
    with pytest.raises(UserError, match="trained on the base"):
        PeftModel.from_pretrained(other, "alice/stock-adapter")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{}", "alice/x"), "folder=.*: has neither an adapter nor a model; give the directory"),
        (("{}", "model"), "^push_to_hub: name=model: needs the user or organization"),
        (("~no-such-user/x\0", "alice/x"), "folder='~no-such-user/x.*': is not a path"),
        (("{}" + "x" * 300, "alice/x"), "folder=.*x': is not a path .*too long"),
        (("{}", "alice/x", "alice/x"), "base=alice/x: must not be the repository of name"),
    ],
)
def test_other_arguments(hub, tmp_path, arguments, message):
    folder, name, *base = (argument.replace("{}", str(tmp_path)) for argument in arguments)
    with pytest.raises(UserError, match=message):
        hqqtrain.push_to_hub(folder, name, base=base[0] if base else None)
    assert hub.requests == []


def test_the_directory_of_a_run(hub, quantized, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {name_or_path: meta/base}\ntask: quantize\n")
    with pytest.raises(UserError, match="the run has no result yet; finish it"):
        hqqtrain.push_to_hub(tmp_path, "alice/run")
    hqqtrain.save_quantized(quantized, tmp_path / "quantized")
    (tmp_path / "status.json").write_text('{"status": "failed"}')
    with pytest.raises(UserError, match=r"the run is not complete \(failed\); finish it"):
        hqqtrain.push_to_hub(tmp_path, "alice/run")
    (tmp_path / "status.json").write_text('{"status": "done"}')
    hqqtrain.push_to_hub(tmp_path, "alice/run")
    assert "[meta/base](https://huggingface.co/meta/base)" in hub.text("alice/run", "README.md")
    config = json.loads(hub.text("alice/run", "config.json"))
    assert config["quantization_config"]["quant_method"] == "hqqtrain"
