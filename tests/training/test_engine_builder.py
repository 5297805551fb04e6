"""The strategy selects the engine."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn

from hqqtrain.config.groups import OptimConfig
from hqqtrain.distributed.strategies.registry import STRATEGIES
from hqqtrain.training import engine_builder
from hqqtrain.training.engine_builder import build_engine
from hqqtrain.training.torch_engine import TorchEngine


def test_every_strategy_has_an_engine(monkeypatch):
    built: dict[str, dict] = {}
    for name in ("TorchEngine", "ZeRO3Engine"):
        monkeypatch.setattr(
            engine_builder, name, lambda *_, name=name, **settings: built.setdefault(name, settings)
        )
    runtime = SimpleNamespace(
        training_dtype=torch.bfloat16, device=torch.device("cpu"), accelerator=None
    )
    for name, strategy in STRATEGIES.items():
        built.clear()
        runtime.strategy = strategy
        build_engine(nn.Linear(2, 2), {}, runtime, OptimConfig(), 0.5)
        (engine,) = built
        assert engine == ("ZeRO3Engine" if name == "zero3" else "TorchEngine"), name
        assert built[engine]["max_grad_norm"] == 0.5
        if engine == "TorchEngine":
            assert built[engine]["uses_ddp"] is (name in ("ddp", "fsdp1")), name
        else:
            assert built[engine]["autocast"] == torch.bfloat16


def test_one_process_gets_pytorchs_engine_around_the_model_itself():
    model = nn.Linear(2, 2)
    runtime = SimpleNamespace(strategy=STRATEGIES["single"], accelerator=Accelerator(cpu=True))
    engine = build_engine(model, dict(model.named_parameters()), runtime, OptimConfig(), None)
    assert isinstance(engine, TorchEngine)
    assert engine.model is model
