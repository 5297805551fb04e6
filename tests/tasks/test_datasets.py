"""The text of a run: what is read, and the check that all ranks have read the same."""

from dataclasses import replace
from typing import Any

import pytest

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import check_same_text, load_held_out_data, load_training_data


def test_the_training_data_is_the_text_of_the_source(make_config, start_run):
    with start_run(make_config()) as run:
        sequences = load_training_data(run, TINY_FOLDER)
    text = load_tokenizer(TINY_FOLDER).decode(sequences.stream)
    assert "def train_0(x): return x + 0" in text
    assert max(sequences.end - sequences.begin) == 32


def test_held_out_data_ends_after_the_tokens_that_were_asked_for(make_config):
    config = make_config()
    sequences = load_held_out_data(config, TINY_FOLDER)
    assert sequences is not None
    assert sum(sequences.end - sequences.begin) <= 64
    config.eval.source = None
    assert load_held_out_data(config, TINY_FOLDER) is None


def test_a_signal_stops_the_tokenizer(make_config, start_run, monkeypatch):
    with start_run(make_config()) as run:
        monkeypatch.setattr(PreemptionHandler, "check_local", _raise_preempted)
        with pytest.raises(PreemptedError):
            load_training_data(run, TINY_FOLDER)


def _raise_preempted(_: PreemptionHandler) -> None:
    raise PreemptedError("SIGTERM was received")


class _TwoRanks(Communicator):
    """The first of two ranks, the second of which has read another text."""

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, [*value[:-1], "another digest"]]


def test_ranks_with_another_text_are_refused(make_config, start_run):
    with start_run(make_config()) as run:
        training, comm = load_training_data(run, TINY_FOLDER), run.runtime.comm
        check_same_text(run, training, None)
        other = replace(run.runtime, comm=_TwoRanks(0, 2, comm.device))
        with pytest.raises(UserError, match=r"data\.source=.*not the same on all ranks"):
            check_same_text(Run(run.config, other, run.recorder), training, None)
