"""`train.activation_checkpointing` of a run, as its model gets it."""

from contextlib import ExitStack

import pytest
from random_models import random_family

from hqqtrain.loading.memory_check import AvailableMemory
from hqqtrain.models.families.structure import checkpointed_layers
from hqqtrain.tasks.resources import workload_of
from hqqtrain.training import checkpointing_policy
from hqqtrain.training.checkpointing_policy import apply_checkpointing


@pytest.mark.parametrize(
    ("mode", "free", "recomputes"),
    [
        ("none", 1 << 40, [False, False]),
        ("full", 1 << 40, [True, True]),
        ("offload", 1 << 40, [True, True]),
        (1, 1 << 40, [True, False]),
        ("auto", 1 << 40, [False, False]),
        ("auto", 1 << 10, [True, True]),
    ],
)
def test_layers_that_recompute(make_config, start_run, monkeypatch, mode, free, recomputes):
    """On a CPU, `auto` recomputes only if host memory is short."""
    available = AvailableMemory(host=free, disk=0)
    monkeypatch.setattr(checkpointing_policy, "available_memory", lambda *_: available)
    model = random_family("llama", num_hidden_layers=2)
    with start_run(make_config(train={"activation_checkpointing": mode})) as run:
        undo = ExitStack()
        apply_checkpointing(model, run.runtime, workload_of(run.config), undo)()
    assert [layer.gradient_checkpointing for layer in checkpointed_layers(model)] == recomputes
    undo.close()
    assert not any(layer.gradient_checkpointing for layer in checkpointed_layers(model))
    assert not model.get_input_embeddings()._forward_hooks


def test_auto_leaves_a_model_alone_that_cannot_recompute(make_config, start_run, monkeypatch):
    monkeypatch.setattr(checkpointing_policy, "_mode_on_cpu", lambda *_: "auto")  # as on a GPU
    model = random_family("ctrl", n_embd=32, n_layer=1, n_head=2, dff=48)
    with start_run(make_config(train={"activation_checkpointing": "auto"})) as run:
        apply_checkpointing(model, run.runtime, workload_of(run.config), ExitStack())()
    assert checkpointed_layers(model) == []
