"""The tasks of `eval.harness` are measured with and without the adapter, and recorded."""

import json
import logging
from dataclasses import replace

import pytest
from fake_lm_eval import fake_lm_eval, write_task

from hqqtrain.cli import main
from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import EvalConfig
from hqqtrain.distributed.strategies.registry import STRATEGIES
from hqqtrain.tasks import inference
from hqqtrain.tasks.card_figures import card_metrics, describe_protocol
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.harness import load_harness

__all__ = ["fake_lm_eval"]


@pytest.mark.usefixtures("fake_lm_eval")
def test_figures_are_in_the_summary_the_metrics_and_the_card(
    make_config, start_run, tmp_path, caplog
):
    evaluation = {"harness": [str(write_task(tmp_path))], "reference": "off"}
    with caplog.at_level(logging.INFO), start_run(make_config("eval", eval=evaluation)) as run:
        inference.evaluate(run)
    summary = json.loads(run.layout.summary_json.read_text())["eval"]
    figures = summary["quantized"]["harness"]["mine"]
    assert figures == {"acc": figures["acc"], "acc, strict": 0.5, "n_shot": 0, "documents": 5}
    assert summary["harness_version"] == "0.4.13"
    rows = [json.loads(line) for line in run.layout.metrics_jsonl.read_text().splitlines()]
    assert any(row.get("harness/mine/acc") == figures["acc"] for row in rows)
    assert not any("harness/mine/documents" in row for row in rows)
    card = card_metrics(run.recorder.summary.content)
    assert card["mine acc, quantized"] == figures["acc"]
    assert "lm-evaluation-harness 0.4.13" in describe_protocol(run.recorder.summary.content)
    assert f"quantized model: mine: acc {figures['acc']:.4f}, acc, strict 0.5000" in caplog.text


@pytest.mark.usefixtures("fake_lm_eval")
def test_a_sharded_model_is_refused(make_config, start_run, tmp_path):
    with start_run(make_config(eval={"harness": [str(write_task(tmp_path))]})) as run:
        assert len(load_harness(run)) == 1
        strategy = STRATEGIES["fsdp2"](run.runtime.comm)
        sharded = Run(run.config, replace(run.runtime, strategy=strategy), run.recorder)
        with pytest.raises(UserError, match=r"parallel.strategy=fsdp2 shards it; use .*=ddp"):
            load_harness(sharded)
        run.config.eval.harness = []
        assert load_harness(sharded) == []


@pytest.mark.usefixtures("fake_lm_eval")
def test_names_are_checked_before_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = f"eval.harness=[{write_task(tmp_path)},piqua]"
    assert main(["--check", "recipe=tiny_2bit", "run.name=run", names]) == 2
    assert "eval.harness=piqua: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"harness": ["a", " "]}, "must be a list of tasks"),
        ({"harness": ["a", "a"]}, "must not have a task twice"),
        ({"harness": ["a"], "source": None}, "eval.source=null turns all evaluations off"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    (error,) = EvalConfig(**settings).errors()
    assert error.startswith("eval.harness=")
    assert reason in error
