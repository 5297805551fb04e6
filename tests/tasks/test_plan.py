"""task=plan prints a plan, and writes no run directory."""

import os

from hqqtrain.cli import main


def test_a_plan_is_printed_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["recipe=tiny_2bit", "task=plan", "plan.gpu=24GB", "launch=slurm"]
    assert main(arguments) == 0
    assert "tiny, 5.77 M parameters in 2 bits" in capsys.readouterr().out
    assert os.listdir() == []


def test_faults_of_the_training_are_faults_of_its_plan(capsys):
    arguments = ["recipe=tiny_2bit", "task=plan", "plan.gpu=H100", "adapter.kind=none"]
    assert main(arguments) == 2
    assert "adapter.kind=none: task=finetune trains an adapter" in capsys.readouterr().err
