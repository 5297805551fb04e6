"""A command line describes one run, or the jobs of a sweep, each in its own folder."""

import re

import pytest
import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.compose.command import compose_command
from hqqtrain.compose.compose import compose_config
from hqqtrain.config.run import RunConfig


def test_a_command_without_a_sweep_is_one_run():
    command = compose_command(["run.root=out", "quant.nbits=2"], multirun=False)
    (job,) = command.jobs
    assert not command.is_sweep
    assert not command.is_slurm
    assert job.config == compose_config(["run.root=out", "quant.nbits=2"])
    assert command.describe_directories() == str(job.folder)


def test_a_sweep_has_a_job_for_every_combination_and_lists_their_folders():
    command = compose_command(["run.root=out", "quant.nbits=2,3", "train.seed=1"], multirun=True)
    settings = [(job.config.quant.nbits, job.config.train.seed) for job in command.jobs]
    assert settings == [(2, 1), (3, 1)]
    title, *lines = command.describe_directories().splitlines()
    assert title == "sweep of 2 jobs:"
    assert [line.split()[0] for line in lines] == [str(job.folder) for job in command.jobs]
    assert len({job.folder for job in command.jobs}) == 2


def test_a_sweep_of_one_value_is_a_sweep_on_request_only():
    assert compose_command(["quant.nbits=2"], multirun=True).is_sweep
    assert not compose_command(["quant.nbits=2"], multirun=False).is_sweep


def test_a_recipe_may_be_a_sweep(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("# mine\nsweep: {quant.nbits: '2,3'}\n")
    monkeypatch.setenv("HQQTRAIN_RECIPES", str(tmp_path))
    command = compose_command(["recipe=mine"], multirun=False)
    assert command.is_sweep
    assert [job.config.quant.nbits for job in command.jobs] == [2, 3]


def test_a_run_on_slurm_says_so():
    command = compose_command(["launch=slurm"], multirun=False)
    assert command.is_slurm
    assert command.describe_directories().startswith("slurm job:\n")


def test_the_configuration_as_a_recipe_composes_to_itself(tmp_path, monkeypatch):
    words = ["quant.nbits=2", "quant.overrides={*.q_proj:{nbits:4}}", "data.source='a: b, #c'"]
    text = compose_command(words, multirun=False).as_recipes()
    (tmp_path / "saved.yaml").write_text(text)
    monkeypatch.setenv("HQQTRAIN_RECIPES", str(tmp_path))
    again, first = compose_config(["recipe=saved"]), compose_config(words)
    assert again.quant == first.quant
    assert again.data.source == "a: b, #c"
    assert again.identity() == first.identity()


def test_the_recipes_of_a_sweep_are_documents_of_one_file():
    text = compose_command(["quant.nbits=2,3"], multirun=True).as_recipes()
    nbits = [document["quant"]["nbits"] for document in yaml.safe_load_all(text)]
    assert nbits == [2, 3]
    assert len(re.findall("^# Everything that", text, re.MULTILINE)) == 2


def test_different_jobs_may_not_share_a_folder():
    with pytest.raises(UserError, match=r"^run\.name=x: every job of a sweep needs its own folder"):
        compose_command(["run.name=x", "quant.nbits=2,3"], multirun=True)


def test_equal_jobs_may_share_a_folder():
    jobs = compose_command(["run.name=x", "track.project=a,b"], multirun=True).jobs
    assert jobs[0].folder == jobs[1].folder


def test_different_jobs_may_not_push_to_one_repository():
    with pytest.raises(UserError, match=r"^hub\.push=alice/x: every job of a sweep would push its"):
        compose_command(["hub.push=alice/x", "quant.nbits=2,3"], multirun=True)
    compose_command(["hub.push=alice/x", "track.project=a,b"], multirun=True)
    compose_command(["hub.push=alice/x"], multirun=False)


def test_parallel_jobs_of_a_single_run_are_refused():
    words = ["launch.max_parallel_jobs=2"]
    with pytest.raises(UserError, match=r"^launch\.max_parallel_jobs=2: .* this is one run"):
        compose_command(words, multirun=False)
    assert compose_command([*words, "quant.nbits=2,3"], multirun=True).is_sweep


def test_every_job_is_checked_before_the_first_starts():
    with pytest.raises(UserError, match=r"quant\.nbits=5: allowed are"):
        compose_command(["quant.nbits=2,5"], multirun=True)


def test_the_defaults_are_a_command():
    assert compose_command([], multirun=False).jobs[0].config == RunConfig()


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        (["quant.nbits=2,5,6", "optim.lr=-1"], ["quant.nbits=5", "quant.nbits=6", "optim.lr=-1"]),
        (["quant.nbits=x,y", "a=1"], ["quant.nbits=x", "quant.nbits=y", "a: ", "Groups and keys"]),
    ],
)
def test_the_faults_of_all_jobs_are_reported_at_once(words, begins):
    with pytest.raises(UserError) as caught:
        compose_command(words, multirun=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(begins)
    assert all(sum(line.startswith(begin) for line in lines) == 1 for begin in begins)
