"""Runs of a tiny random model in this process, for tests of one task at a time."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.groups import DataConfig, EvalConfig, OptimConfig, TrainConfig
from hqqtrain.config.infra import CheckpointConfig, RunDirConfig, TrackConfig
from hqqtrain.config.model import ModelConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.models.build import load_hf_config
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.recorder import RunRecorder

StartRun = Callable[[RunConfig], AbstractContextManager[Run]]


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """Return the folder of a random Llama with one layer, bf16, and the bundled tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=load_hf_config(TINY_FOLDER).vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "model"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY_FOLDER / name).read_bytes())
    return folder


@pytest.fixture
def make_config(tiny_model: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes the configuration of a run of two steps.

    It takes the task, and keys of groups as in `make_config("eval", ckpt={"every": 1})`.
    """
    for name in ("train", "held_out"):
        lines = [f"def {name}_{number}(x): return x + {number}" for number in range(20)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))

    def make(task: str = "finetune", **groups: dict[str, Any]) -> RunConfig:
        config = RunConfig(
            task=task,
            model=ModelConfig(name_or_path=str(tiny_model)),
            quant=QuantConfig(nbits=4, group_size=16, solver="rtn", backend="torch"),
            adapter=AdapterConfig(r=2, alpha=4),
            train=TrainConfig(
                max_steps=2, global_batch_size=2, micro_batch_size=1, max_seq_len=32,
                precision="fp32",
            ),
            optim=OptimConfig(lr=0.01, warmup_steps=0),
            data=DataConfig(source=str(tmp_path / "train.txt")),
            eval=EvalConfig(source=str(tmp_path / "held_out.txt"), tokens=64),
            ckpt=CheckpointConfig(every=1),
            track=TrackConfig(backends=[]),
            run=RunDirConfig(root=str(tmp_path / "runs"), name="run"),
        )  # fmt: skip
        for group, keys in groups.items():
            for key, value in keys.items():
                setattr(getattr(config, group), key, value)
        return config

    return make


@pytest.fixture
def start_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartRun]:
    """Return a context manager that starts a run as `dispatch_task` does, without a report."""
    logger = logging.getLogger("hqqtrain")
    handlers, level = logger.handlers, logger.level
    monkeypatch.setattr("hqqtrain.tasks.finalize.write_report", lambda *_, **__: {})

    @contextmanager
    def start(config: RunConfig) -> Iterator[Run]:
        settings = RuntimeSettings(
            config.parallel, config.quant, config.adapter, config.train, config.optim,
            trains=config.task == "finetune",
        )  # fmt: skip
        runtime = Runtime.start(settings, PreemptionHandler(config.run))
        with RunRecorder(config, runtime, ["python", "-m", "hqqtrain"]) as recorder:
            yield Run(config, runtime, recorder)

    yield start
    logger.handlers, logger.level = handlers, level
