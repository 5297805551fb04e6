"""The model of task=generate is loaded as its settings say; nothing is written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.generation.generator import TextGenerator
from hqqtrain.models.fqn import base_model
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.generation import generate_texts, load_generator
from hqqtrain.tasks.recorder import RunRecorder


def _start(config: RunConfig, precision: str = "fp32") -> Run:
    settings = RuntimeSettings(
        config.parallel, config.quant, config.adapter, config.train, config.optim, trains=False
    )
    runtime = Runtime.start(settings, PreemptionHandler(config.run))
    # accelerate has one precision in a process, but only autocast would use it.
    runtime = replace(runtime, precision=precision)
    return Run(config, runtime, RunRecorder(config, runtime, []))


@pytest.fixture
def load(make_config, monkeypatch) -> Callable[..., TextGenerator]:
    """Return a function that loads a model, whose layers stay packed as on a GPU."""
    monkeypatch.setattr("hqqtrain.tasks.generation.free_host_memory", lambda: 0)

    def load(*, precision: str = "fp32", **groups) -> TextGenerator:
        return load_generator(_start(make_config("generate", **groups), precision))

    return load


def _modules(generator: TextGenerator, kind: type) -> int:
    return sum(isinstance(module, kind) for module in generator._model.modules())


@pytest.fixture
def trained(make_config, start_run) -> Path:
    with start_run(make_config(eval={"source": None}, adapter={"dtype": "fp32"})) as run:
        finetune(run)
    return run.layout.folder


def test_adapters_have_the_dtype_of_the_model(load, trained: Path):
    generator = load(model={"name_or_path": str(trained)}, precision="bf16")
    adapters = [p for n, p in generator._model.named_parameters() if "lora_" in n]
    assert {param.dtype for param in adapters} == {torch.bfloat16}
    assert _modules(generator, HQQLinear) == 7
    assert generator.generate("def f(x):").token_ids


def test_a_dense_model_is_quantized_or_not(load, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    assert _modules(load(), HQQLinear) == 7
    assert _modules(load(quant={"nbits": None}), HQQLinear) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cpu_dequantizes_once_if_there_is_memory(load, trained: Path, monkeypatch):
    name = {"name_or_path": str(trained)}
    packed = load(model=name)
    monkeypatch.setattr("hqqtrain.tasks.generation.free_host_memory", lambda: 1 << 30)
    dense = load(model=name)
    assert (_modules(packed, HQQLinear), _modules(dense, HQQLinear)) == (7, 0)
    prompt = "def f(x):"
    assert dense.generate(prompt).token_ids == packed.generate(prompt).token_ids


def test_a_quantized_model_needs_no_bits(load, trained: Path, tmp_path: Path):
    folder = shutil.copytree(trained / "quantized", tmp_path / "packed")
    assert (
        _modules(load(model={"name_or_path": str(folder)}, quant={"nbits": None}), HQQLinear) == 7
    )


def test_quantized_weights_come_from_the_cache(load, tmp_path: Path):
    for _ in range(2):
        load(quant={"cache_dir": str(tmp_path / "cache")})
        entries = [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]
        assert len(entries) == 1


def test_the_settings_in_the_folder_of_the_adapter_come_first(
    load, trained: Path, tiny_model: Path, tmp_path: Path
):
    adapter = {"init_from": str(shutil.copytree(trained / "adapter", tmp_path / "copy"))}
    write_settings(tiny_model, {"eos_token_id": 5, "temperature": 0.3})
    assert base_model(load(adapter=adapter)._model).generation_config.eos_token_id == 5
    write_settings(tmp_path / "copy", {"eos_token_id": [5, 6]})
    assert base_model(load(adapter=adapter)._model).generation_config.eos_token_id == [5, 6]
    write_settings(tmp_path / "copy", {"eos_token_id": "x"})
    with pytest.raises(UserError, match=r"copy/generation_config\.json: cannot be used"):
        load(adapter=adapter)


def write_settings(folder: Path, settings: dict) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def test_a_reader_that_stops_early_is_no_error(make_config, monkeypatch):
    def stop(*_: object) -> None:
        raise BrokenPipeError

    run = _start(make_config("generate", generate={"prompt": "x", "max_new_tokens": 2}))
    monkeypatch.setattr(run.recorder.console, "stream_text", stop)
    monkeypatch.setattr("hqqtrain.tasks.generation._close_output", lambda: None)
    generate_texts(run)
