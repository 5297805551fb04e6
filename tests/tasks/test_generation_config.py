"""A model that was trained to end its turns with a token of its own stops there when it is used."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_examples import CHAT, COMPLETION
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hqqtrain.config.groups import DataConfig, TrainConfig
from hqqtrain.data.chat.library import chat_template_source
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.packing import pack_examples
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.tasks.export import export
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.generation_config import trained_generation_config

EOS, END = 0, 4096
"""The ids of EOS, and of `<|im_end|>`, which is added to the tokenizer."""


def _loader(
    folder: Path, example: object, template: str | None = "chatml", *, adds: bool = True
) -> PackedLoader:
    """Save a tokenizer, and return the loader of an example that it has encoded."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    if adds:
        tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template and chat_template_source(template)
    tokenizer.save_pretrained(folder)
    data = DataConfig(chat_template=template or "auto")
    packed = pack_examples([example], tokenizer, max_seq_len=64, data=data)
    return PackedLoader(packed.sequences, TrainConfig(max_steps=1))


def _settings(folder: Path, loader: PackedLoader, **config: object) -> dict | None:
    """Return the settings of a model in `folder`, with these values in its config.json."""
    source = SimpleNamespace(tokenizer=folder)
    plan = SimpleNamespace(source=source, hf_config=SimpleNamespace(**config))
    return trained_generation_config(plan, loader)


def test_the_token_joins_those_of_the_base(tmp_path: Path):
    loader, file = _loader(tmp_path, CHAT), tmp_path / "generation_config.json"
    from_config = {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": None}
    assert _settings(tmp_path, loader, **from_config) == {
        "eos_token_id": [0, END], "bos_token_id": 1,
    }  # fmt: skip
    assert _settings(tmp_path, loader) == {"eos_token_id": [END]}
    for own, expected in [
        ({"eos_token_id": 3, "top_k": 5}, {"eos_token_id": [3, END], "top_k": 5}),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": [2, 0, END]}),
        ({"eos_token_id": END}, None),
        ({"eos_token_id": [0, END]}, None),
        ({"top_k": 5}, {"eos_token_id": [0, END], "top_k": 5}),
        ({"eos_token_id": None}, {"eos_token_id": [END]}),
        ({"eos_token_id": [None, "</s>", True, 0]}, {"eos_token_id": [0, END]}),
        ({"top_p": float("nan")}, {"eos_token_id": [0, END], "top_p": None}),
        ([1], {"eos_token_id": [0, END]}),
    ]:
        file.write_text(json.dumps(own))
        found = _settings(tmp_path, loader, eos_token_id=0)
        assert found == expected, own
        json.dumps(found, allow_nan=False)  # it can be written at the end of a training


@pytest.mark.parametrize(
    ("example", "template", "adds"),
    [
        ("def f(x): return x", "chatml", True),
        ("def f(x): return x", None, True),
        (COMPLETION, "chatml", True),
        (CHAT, "chatml", False),  # the marker is ordinary text
        (CHAT, "plain", True),
    ],
)
def test_settings_stay_if_no_other_token_was_trained(tmp_path: Path, example, template, adds):
    loader = _loader(tmp_path, example, template, adds=adds)
    assert _settings(tmp_path, loader, eos_token_id=EOS) is None


def test_an_export_of_a_streamed_run_stops_at_the_end_of_a_turn(
    tmp_path: Path, make_config, start_run, caplog
):
    caplog.set_level("INFO")
    base = tmp_path / "base"
    shutil.copytree(TINY_FOLDER, base)
    own = {"eos_token_id": EOS, "temperature": 0.7, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(own))
    rows = json.dumps({"messages": CHAT.messages}) + "\n"
    (tmp_path / "rows.jsonl").write_text(rows * 8)
    settings = {
        "model": {"name_or_path": str(base)}, "eval": {"source": None}, "train": {"max_steps": 1},
        "data": {"source": str(tmp_path / "rows.jsonl"), "streaming": True,
                 "chat_template": "chatml", "add_tokens": ["<|im_end|>"]},
    }  # fmt: skip
    with start_run(make_config(**settings)) as run:
        finetune(run)
    message = f"end its turns with <|im_end|>, so eos_token_id is [{EOS}, {END}]"
    assert message in caplog.text
    source = {"name_or_path": str(run.layout.folder)}
    with start_run(make_config("export", model=source, run={"name": "export"})) as exported:
        export(exported)
    found = GenerationConfig.from_pretrained(exported.layout.export)
    assert (found.eos_token_id, found.temperature) == ([EOS, END], 0.7)
    model = AutoModelForCausalLM.from_pretrained(exported.layout.export)
    written = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False, temperature=None,
        sequence_bias={(END,): 1e4},
    )  # fmt: skip
    assert written.tolist() == [[5, 6, 7, END]]
