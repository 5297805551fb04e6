"""quant.backend of another package computes in task=generate and task=eval."""

import logging
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.inference.backends.base import RepackedLinear
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.tasks.generation import load_generator
from hqqtrain.tasks.inference import evaluate
from hqqtrain.tasks.inference_backend import inference_backend

TORCHAO = {
    "backend": "torchao", "group_size": 32, "overrides": {"*.down_proj": {"group_size": 16}}
}  # fmt: skip


@pytest.fixture
def start_in(start_run):
    """Return a context that starts a run in a precision; accelerate has one in a process."""

    @contextmanager
    def start(config, precision="bf16"):
        with start_run(config) as run:
            yield replace(run, runtime=replace(run.runtime, precision=precision))

    return start


def test_generate(make_config, start_in, monkeypatch, caplog):
    monkeypatch.setattr("hqqtrain.tasks.generation.free_host_memory", lambda: 0)
    config = make_config("generate", quant=TORCHAO)
    with caplog.at_level(logging.INFO, "hqqtrain"), start_in(config) as run:
        generator = load_generator(run)
    modules = list(generator._model.modules())
    assert sum(isinstance(module, RepackedLinear) for module in modules) == 3
    assert sum(isinstance(module, HQQLinear) for module in modules) == 1
    assert generator.generate("def f(x):").token_ids
    assert [line for line in caplog.messages if "backend=" in line] == [
        "backend=torchao: computes 3 of 4 quantized layers; hqqtrain's own kernels compute the "
        "others: 1 with groups of 16"
    ]


def test_eval(make_config, start_in):
    found = []
    for quant in (TORCHAO, {**TORCHAO, "backend": "torch"}):
        run = {"name": f"eval-{quant['backend']}"}
        config = make_config("eval", quant=quant, eval={"reference": "off"}, run=run)
        with start_in(config) as run:
            evaluate(run)
        found.append(run.recorder.summary.content.measured_models()["quantized"].perplexity)
    ours, theirs = found
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.02)


def test_it_is_refused_before_weights_are_read(make_config, start_in, monkeypatch):
    monkeypatch.setattr("hqqtrain.tasks.generation.load_source", None)
    for backend, precision, message in (
        ("gemlite", "bf16", r"^quant\.backend=gemlite: computes on cuda, and the device is cpu"),
        ("torchao", "fp32", r"^quant\.backend=torchao: computes in bfloat16"),
    ):
        config = make_config("generate", quant={"backend": backend})
        with start_in(config, precision) as run, pytest.raises(UserError, match=message):
            load_generator(run)


def test_it_is_refused_if_it_computes_no_layer(make_config, start_in):
    config = make_config("generate", quant={"backend": "torchao"})
    refused = pytest.raises(UserError, match=r"^quant\.backend=torchao: can compute none .* 4 with")
    with start_in(config) as run, refused:
        load_generator(run)


def test_without_quantization_it_is_not_used(make_config, start_in):
    config = make_config("eval", quant={"backend": "torchao", "nbits": None})
    with start_in(config) as run:
        assert inference_backend(run) is None


def test_layers_must_be_whole(make_config):
    strategy = SimpleNamespace(shards_parameters=True, name="fsdp2")
    run = SimpleNamespace(
        config=make_config("eval", quant=TORCHAO), runtime=SimpleNamespace(strategy=strategy)
    )
    with pytest.raises(UserError, match=r"quant.backend=torchao: .*parallel.strategy=fsdp2 shards"):
        inference_backend(run)
