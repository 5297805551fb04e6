"""The last lines of a run, which say how to use its results, can be pasted into a shell."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hqqtrain.compose.compose import compose_config
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import ExportMetrics, QuantizeMetrics, Summary, TrainMetrics
from hqqtrain.tasks.hints import usage_hints

TRAINED = Summary(train=TrainMetrics(steps=2))


def _trained_layout(folder: Path) -> RunLayout:
    """Return the layout of a run with the files that say that it has weights and an adapter."""
    layout = RunLayout(folder)
    for file in (layout.quantized / "config.json", layout.adapter / "adapter_config.json"):
        file.parent.mkdir(parents=True)
        file.touch()
    return layout


@pytest.mark.parametrize(
    "name",
    ["mine", "my (1) run", "it's", "a,b", "a=b", "größe", "$x", "1e3", "${x}", "a\\b", "a b\\",
     r"a\\'b", r"\${x}", "a\\\\"],
)  # fmt: skip
def test_the_commands_use_the_run(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    hints = usage_hints(TRAINED, _trained_layout(Path("runs") / name))
    (tmp_path / "runs" / name / "config.yaml").write_text("task: finetune\n")
    for hint, task in zip(hints, ("task=generate", "task=export"), strict=True):
        python, *words = shlex.split(hint.partition(": ")[2])
        assert words[:3] == ["-m", "hqqtrain", task]
        assert python in ("python", sys.executable)
        assert compose_config(words[2:]).model.name_or_path == f"runs/{name}"


def test_the_interpreter_is_named_unless_it_is_the_one_on_the_path(tmp_path: Path, monkeypatch):
    layout = _trained_layout(tmp_path / "x")
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    assert f": python -m hqqtrain task=export model.name_or_path={tmp_path}/x" in "".join(
        usage_hints(TRAINED, layout)
    )
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert f": {sys.executable} -m hqqtrain " in "".join(usage_hints(TRAINED, layout))


@pytest.mark.parametrize("name", ["null", "1e5", "true", "007", "x"])
def test_a_folder_is_no_number(name: str):
    (hint,) = usage_hints(Summary(export=ExportMetrics("packed")), _layout_of_export(Path(name)))
    (word,) = shlex.split(hint.partition(": ")[2])
    assert compose_config([word, "task=eval"]).model.name_or_path == name


FORMATS = {
    "humming": "vllm serve runs/x/export --enable-lora --lora-modules trained=",
    "mlx": "--model runs/x/export --adapter-path runs/x/export/adapter --prompt",
    "gguf": "llama-cli -m runs/x/export --lora runs/x/export/adapter.gguf",
    "packed": "runs/x/export adapter.init_from=runs/x/export/adapter",
    "hqq": "4.57 and hqq: peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.",
    "dense": "_pretrained('runs/x/export'), 'runs/x/export/adapter')",
}


def _layout_of_export(export: Path) -> Any:
    return SimpleNamespace(export=export)


def test_nothing_is_said_about_what_cannot_be_exported(tmp_path: Path):
    layout = _trained_layout(tmp_path / "x")
    assert usage_hints(Summary(), layout) == []
    (layout.quantized / "config.json").unlink()  # quant.save=false
    assert usage_hints(TRAINED, layout) == []


def test_a_run_that_has_quantized_nothing_can_be_exported(tmp_path: Path):
    layout = RunLayout(tmp_path)
    layout.adapter.mkdir()
    (layout.adapter / "adapter_config.json").write_text("{}")
    for nbits, hints in ((None, 2), (4, 0)):  # 4 bits with quant.save=false
        summary = replace(TRAINED, quantize=QuantizeMetrics(nbits=nbits))
        assert len(usage_hints(summary, layout)) == hints


def test_an_export_says_how_to_load_it(tmp_path: Path):
    layout = RunLayout(Path("runs/x"))
    (dense,) = usage_hints(Summary(export=ExportMetrics("dense")), layout)
    assert dense == "load it: transformers.AutoModelForCausalLM.from_pretrained('runs/x/export')"
    (packed,) = usage_hints(Summary(export=ExportMetrics("packed")), layout)
    for format, words in FORMATS.items():
        metrics = ExportMetrics(format, adapter_form="separate")
        (hint,) = usage_hints(Summary(export=metrics), layout)
        assert words in hint
        (alone,) = usage_hints(Summary(export=ExportMetrics(format)), layout)
        assert "adapter" not in alone
    assert packed == "use it: model.name_or_path=runs/x/export"


@pytest.mark.parametrize(
    ("config", "option"),
    [({"r": 8}, ""), ({"r": 16}, ""), ({"r": 24}, "--max-lora-rank 32 "),
     ({"r": 8, "rank_pattern": {"q_proj": 64}}, "--max-lora-rank 64 ")],
)  # fmt: skip
def test_vllm_is_told_of_a_large_rank(tmp_path: Path, config: dict, option: str):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    metrics = ExportMetrics("humming", adapter_form="separate")
    (hint,) = usage_hints(Summary(export=metrics), _layout_of_export(tmp_path))
    assert hint.endswith(f" --enable-lora {option}--lora-modules trained={adapter}")
