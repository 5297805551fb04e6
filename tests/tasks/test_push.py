"""A run pushes its result to a stand-in of the Hub, from which stock loaders read it."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer, push_on_ranks
from peft import AutoPeftModelForCausalLM, PeftModel
from ranks import on_ranks
from transformers import AutoModelForCausalLM

import hqqtrain
from hqqtrain.common import signals
from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.models.build import load_hf_config
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.inference import quantize
from hqqtrain.tasks.push import check_push, push_results

TOKENS = torch.arange(16).view(2, 8) + 5


def _push(config) -> None:
    push_results(config, SINGLE_PROCESS, PreemptionHandler(config.run))


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture
def quantized_run(make_config, start_run):
    """Return the configuration of a finished task=quantize, and its folder."""
    config = make_config("quantize", hub={"push": "alice/model"})
    with start_run(config) as run:
        quantize(run)
    return config, run.layout.folder


def test_a_training_is_pushed_with_its_base(hub, make_config, start_run, tiny_model):
    (tiny_model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    config = make_config(hub={"push": "alice/tuned"}, eval={"reference": "resident"})
    with start_run(config) as run:
        check_push(config, run.layout, SINGLE_PROCESS)
        assert [repo.private for repo in hub.repos.values()] == [True, True]
        finetune(run)
    folder = run.layout.folder
    _push(config)
    base, tuned = hub.repos["alice/tuned-base"].files, hub.repos["alice/tuned"].files
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= base.keys()
    assert sorted(tuned) == [".gitattributes", "README.md", "adapter_config.json",
                             "adapter_model.safetensors"]  # fmt: skip
    sent = len(hub.received)
    _push(config)
    assert len(hub.received) == sent
    assert [repo.titles[1:] for repo in hub.repos.values()] == [
        ["Push quantized with hqqtrain"], ["Push adapter with hqqtrain"],
    ]  # fmt: skip
    _assert_complete(hub, folder, tiny_model)
    _assert_loads(hub.text("alice/tuned", "README.md"), folder)


def _assert_complete(hub: HubServer, folder: Path, model: Path) -> None:
    """Both cards have the facts of the run, and no file has a path of this machine."""
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("alice/tuned", "alice/tuned-base"):
        card = hub.text(name, "README.md")
        for fact in (
            "license: apache-2.0", "pipeline_tag: text-generation", "- hqqtrain",
            summary["quantize"]["fingerprint"], "4, groups of 16, axis 1, solver `rtn`",
            f"{summary['quantize']['bits_per_weight']:.2f}, scales and zeros counted",
            f"| perplexity, quantized | {summary['eval']['quantized']['perplexity']:.4g} |",
            f"| KL, quantized | {summary['eval']['quantized']['kl']:.4g} |",
            "Measured on .../held_out.txt: `eval.protocol=windows`",
            "python -m hqqtrain", "Made with hqqtrain 0.1.0, torch ", "`model`",
        ):  # fmt: skip
            assert fact in card
        for content in hub.repos[name].files.values():
            data = hub.objects[content] if isinstance(content, str) else content
            assert str(model.parent).encode() not in data
            assert TOKEN.encode() not in data
    for file in filter(Path.is_file, folder.rglob("*")):
        assert TOKEN.encode() not in file.read_bytes()
    card = hub.text("alice/tuned", "README.md")
    assert "base_model: alice/tuned-base\n" in card
    assert "base_model_relation: adapter" in card
    assert f"| perplexity, trained | {summary['eval']['final']['perplexity']:.4g} |" in card
    assert "perplexity, trained" not in hub.text("alice/tuned-base", "README.md")


def _assert_loads(card: str, folder: Path) -> None:
    """The program of the card, and other ways to load the adapter, compute what the run has."""
    expected = _logits(hqqtrain.load_quantized(folder))
    (program,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    file = folder.parent / "program.py"
    file.write_text(program)
    scope = runpy.run_path(str(file))
    assert torch.equal(_logits(scope["model"]), expected)
    assert scope["tokenizer"]("def f(x)").input_ids
    assert torch.equal(_logits(AutoPeftModelForCausalLM.from_pretrained("alice/tuned")), expected)
    assert torch.equal(_logits(hqqtrain.load_quantized("alice/tuned-base")),
                       _logits(hqqtrain.load_quantized(folder, adapter=False)))  # fmt: skip
    other = AutoModelForCausalLM.from_config(load_hf_config(folder.parents[1] / "model"))
    with pytest.raises(UserError, match="trained on the quantized base"):
        PeftModel.from_pretrained(other, "alice/tuned")


def test_a_failed_push_loses_nothing(hub, quantized_run):
    config, folder = quantized_run
    hub.cut_off = set(range(100))
    advice = rf"The run in {folder} is complete: the same command pushes what is missing\.$"
    with pytest.raises(UserError, match=rf"^hub.push=alice/model: the connection .*{advice}"):
        _push(config)
    config.run.resume = "never"
    with pytest.raises(UserError, match=r"the same command with run.resume=auto pushes"):
        _push(config)
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    hub.cut_off = set()
    _push(config)
    assert "model.safetensors" in hub.repos["alice/model"].files


def test_the_push_stops_when_it_is_asked_to(hub, quantized_run, monkeypatch):
    monkeypatch.setattr(signals, "received_signal", lambda: "SIGTERM")
    with pytest.raises(PreemptedError, match="SIGTERM was received"):
        _push(quantized_run[0])
    assert hub.received == []


def test_what_the_user_has_written_is_kept(hub, quantized_run, tmp_path):
    config, folder = quantized_run
    card = folder / "quantized" / "README.md"
    card.write_text(f"My model, from {tmp_path}/model")
    with pytest.raises(UserError, match=rf"^{card}: contains {tmp_path}/\w+, a path of this mach"):
        _push(config)
    card.write_text("My model")
    _push(config)
    assert hub.text("alice/model", "README.md") == "My model"


def test_other_tasks_push_nothing(hub, make_config, start_run):
    for config in (make_config("eval", hub={"push": "alice/model"}), make_config("quantize")):
        with start_run(config) as run:
            check_push(config, run.layout, SINGLE_PROCESS)
        _push(config)
    assert hub.requests == []


def test_the_dense_base_of_an_adapter_must_be_on_the_hub(hub, make_config, start_run, tiny_model):
    config = make_config(quant={"nbits": None}, hub={"push": "alice/tuned"})
    with start_run(config) as run:
        with pytest.raises(UserError, match=rf"model.name_or_path={tiny_model}, is not on the Hub"):
            check_push(config, run.layout, SINGLE_PROCESS)
        config.hub.base = "meta/base"
        check_push(config, run.layout, SINGLE_PROCESS)
        finetune(run)
    _push(config)
    assert list(hub.repos) == ["alice/tuned"]
    adapter = json.loads(hub.text("alice/tuned", "adapter_config.json"))
    assert adapter["base_model_name_or_path"] == "meta/base"
    assert "import hqqtrain" not in hub.text("alice/tuned", "README.md")


def test_a_base_of_the_hub_gets_no_copy(hub, quantized_run, make_config, start_run):
    _push(quantized_run[0])
    config = make_config(
        model={"name_or_path": "alice/model"}, hub={"push": "alice/tuned"}, run={"name": "second"}
    )
    with start_run(config) as run:
        check_push(config, run.layout, SINGLE_PROCESS)
        finetune(run)
    _push(config)
    assert sorted(hub.repos) == ["alice/model", "alice/tuned"]
    assert len(hub.repos["alice/model"].titles) == 2
    card = hub.text("alice/tuned", "README.md")
    assert "base_model: alice/model\n" in card
    assert "full-precision model" not in card
    model = AutoPeftModelForCausalLM.from_pretrained("alice/tuned")
    expected = _logits(hqqtrain.load_quantized(run.layout.folder))
    assert torch.equal(_logits(model), expected)


def test_rank_0_pushes_and_the_others_see_its_failure(hub, quantized_run, tmp_path):
    config, _ = quantized_run
    first, second = on_ranks(push_on_ranks, 2, hub.url, config, tmp_path / "cache")
    assert len(hub.received) == 1
    assert first == second
    assert first.startswith("hub.push=bob/model: the token may not write there")
