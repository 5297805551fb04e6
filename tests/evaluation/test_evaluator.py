"""An evaluator measures as `evaluate_perplexity` does, shows its progress, and can be stopped."""

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from hqqtrain.common.errors import PreemptedError
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.data.sequences import TokenSequences, plain_text_targets
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.evaluation.evaluator import Evaluator
from hqqtrain.evaluation.perplexity import evaluate_perplexity


def _held_out(count: int = 4, length: int = 8) -> TokenSequences:
    stream = (np.arange(count * length) * 7 % 96).astype(np.int32)
    starts = np.arange(0, len(stream), length)
    return TokenSequences(
        stream, plain_text_targets(stream, starts), starts, starts, starts + length
    )


def _evaluator(**settings: Any) -> Evaluator:
    preemption = PreemptionHandler(RunDirConfig())
    return Evaluator(_held_out(), SINGLE_PROCESS, preemption, **{"batch_size": 2} | settings)


def test_the_figures_and_the_progress(make_model):
    model, reference, shown = make_model(), make_model("qwen2"), []

    @contextmanager
    def show_progress(held_out: TokenSequences):
        shown.append(held_out.target_token_count)
        yield shown.append
        shown.append("closed")

    found = _evaluator(reference=reference, show_progress=show_progress).evaluate(model)
    expected = evaluate_perplexity(
        model, _held_out(), SINGLE_PROCESS, batch_size=2, reference=reference
    )
    assert found == expected
    assert shown == [28, 14, 14, "closed"]


def test_the_forward_passes_run_under_autocast(make_model):
    dtypes: set[torch.dtype] = set()
    model = make_model()
    model.lm_head.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    _evaluator(autocast=lambda: torch.autocast("cpu", torch.bfloat16)).evaluate(model)
    assert dtypes == {torch.bfloat16}


def test_a_request_to_stop_ends_it_after_a_batch(make_model, monkeypatch):
    model, calls = make_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(PreemptionHandler, "stop_reason", "SIGTERM was received")
    with pytest.raises(PreemptedError):
        _evaluator().evaluate(model)
    assert len(calls) == 1
