"""The text of a run: what is read, and the check that all ranks have read the same."""

import json
from dataclasses import replace
from typing import Any

import pytest

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.data.layout import BatchLayout
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.loading.plan import plan_model
from hqqtrain.models.packing_probe import PackingProbe
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import (
    batch_layout,
    check_same_text,
    load_held_out_data,
    load_training_data,
)
from hqqtrain.tasks.model import plan_settings


def test_the_training_data_is_the_text_of_the_source(make_config, start_run):
    with start_run(make_config()) as run:
        sequences = load_training_data(run, TINY_FOLDER).sequences
    text = load_tokenizer(TINY_FOLDER).decode(sequences.stream)
    assert "def train_0(x): return x + 0" in text
    assert max(sequences.end - sequences.begin) == 32


def test_the_log_says_that_plain_text_is_truncated(make_config, start_run, tmp_path, caplog):
    """That of rows, each of which is a sequence; a packed stream loses nothing."""
    rows = [{"text": "a word " * number} for number in (3, 40, 5, 50, 4, 6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "rows.jsonl")}
    for packing in (True, False):
        config = make_config(data=data, eval={"source": None}, train={"packing": packing})
        config.run.name = f"packing-{packing}"
        with start_run(config) as run:
            load_training_data(run, TINY_FOLDER)
        assert ("2 of 6 examples have more than 32 tokens" in caplog.text) == (not packing)


def test_held_out_data_ends_after_the_tokens_that_were_asked_for(make_config, start_run):
    with start_run(make_config()) as run:
        sequences = load_held_out_data(run, TINY_FOLDER)
        assert sequences is not None
        assert sum(sequences.end - sequences.begin) <= 64
        run.config.eval.source = None
        assert load_held_out_data(run, TINY_FOLDER) is None


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
        training, comm = load_training_data(run, TINY_FOLDER).sequences, run.runtime.comm
        check_same_text(run, training, None)
        other = replace(run.runtime, comm=_TwoRanks(0, 2, comm.device))
        with pytest.raises(UserError, match=r"data\.source=.*not the same on all ranks"):
            check_same_text(Run(run.config, other, run.recorder), training, None)


@pytest.fixture
def find_layout(make_config, start_run, monkeypatch):
    """Return a function that returns the layout of a run, given the result of the probe."""

    def find(probe: PackingProbe, *, others: list[bool] | None = None, **groups) -> BatchLayout:
        config = make_config(**groups)
        with start_run(config) as run:
            plan = replace(plan_model(plan_settings(config), run.runtime), packing=probe)
            if others is not None:
                gathered = others
                monkeypatch.setattr(Communicator, "all_gather_object", lambda *_: gathered)
            return batch_layout(run.config, plan, run.runtime.comm)

    return find


def test_texts_share_rows_if_the_model_keeps_them_apart(find_layout, caplog):
    assert find_layout(PackingProbe(True)) == BatchLayout()
    assert "packing" not in caplog.text


def test_packing_that_cannot_be_honored_is_said(find_layout, caplog):
    layout = find_layout(PackingProbe(False, "lets a text see the texts before it"))
    assert layout == BatchLayout(packs=False)
    assert "train.packing=true: LlamaForCausalLM lets a text see the texts before it" in caplog.text


def test_nothing_is_said_of_packing_that_was_not_asked_for(find_layout, caplog):
    probe = PackingProbe(False, "lets a text see the texts before it")
    assert find_layout(probe, train={"packing": False}) == BatchLayout(packs=False)
    assert "packing" not in caplog.text


def test_all_ranks_pack_or_none(find_layout):
    assert not find_layout(PackingProbe(True), others=[True, False]).packs


@pytest.mark.parametrize(
    ("max_seq_len", "layout"), [(32, BatchLayout()), (65, BatchLayout(False, 64))]
)
def test_long_texts_of_a_model_with_dynamic_rope(
    find_layout, tiny_model, caplog, max_seq_len, layout
):
    config = json.loads((tiny_model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (tiny_model / "config.json").write_text(json.dumps(config))
    assert find_layout(PackingProbe(True), train={"max_seq_len": max_seq_len}) == layout
    assert ("more than 64 tokens" in caplog.text) == (not layout.packs)
