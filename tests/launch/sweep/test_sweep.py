"""The settings that jobs of a sweep share, the labels that distinguish them, and their names."""

from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.compose.command import compose_command
from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.expand import expand_jobs
from hqqtrain.compose.job import Job
from hqqtrain.launch.sweep.sweep import Sweep


def plan(*words: str, multirun: bool = True) -> list[Job]:
    expanded = expand_jobs(list(words), multirun)
    return [Job(line, composed.checked()) for line, composed in expanded]


def test_jobs_share_quantized_weights_and_a_group():
    sweep = Sweep.from_jobs(plan("recipe=tiny_2bit", "run.root=out", "quant.nbits=2,3"))
    for job in sweep.jobs:
        config = compose_config(job.arguments)
        assert config.quant.cache_dir == "out/quantized"
        assert config.track.group == sweep.name
        assert config.run_name() == job.name, "the shared keys do not change the result"
    assert [job.overrides[-1] for job in sweep.jobs] == ["quant.nbits=2", "quant.nbits=3"]


def test_a_look_at_data_has_no_weights_to_share():
    jobs = plan("task=data", "train.max_seq_len=64,128")
    assert [job.shared_overrides for job in Sweep.from_jobs(jobs).jobs] == [(), ()]


@pytest.mark.parametrize("given", ["quant.cache_dir=mine", "quant.cache_dir=null"])
def test_keys_that_the_user_set_are_kept(given):
    sweep = Sweep.from_jobs(plan(given, "track.group=ours", "quant.nbits=2,3"))
    assert [job.arguments for job in sweep.jobs] == [job.overrides for job in sweep.jobs]


def test_keys_that_a_recipe_set_are_kept(tmp_path, monkeypatch):
    recipe = "quant: {cache_dir: theirs}\ntrack: {group: ours}\nsweep: {quant.nbits: '2,3'}\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    monkeypatch.setenv("HQQTRAIN_RECIPES", str(tmp_path))
    sweep = Sweep.from_jobs(plan("recipe=mine", multirun=False))
    assert all(job.shared_overrides == () for job in sweep.jobs)
    assert sweep.name.startswith("sweep-mine-")


@pytest.mark.parametrize(
    "root",
    ["a b", "it's", "it\\'s", "~/runs", "1", "null", "x,y", "{a}", "a=b", "ünï", "b\\c d", "1e3"],
)
def test_any_root_survives_as_an_override(root):
    job = plan("quant.nbits=2", multirun=False)[0]
    job.config.run.root = root
    (shared,) = Sweep.from_jobs([job]).jobs
    assert compose_config(shared.arguments).quant.cache_dir == str(Path(root) / "quantized")


def test_the_name_depends_on_the_jobs_and_not_on_how_they_run():
    name = Sweep.from_jobs(plan("recipe=tiny_2bit", "quant.nbits=2,3")).name
    assert name.startswith("sweep-tiny_2bit-")
    assert (
        Sweep.from_jobs(
            plan("recipe=tiny_2bit", "quant.nbits=3,2", "launch.max_parallel_jobs=2")
        ).name
        == name
    )
    assert Sweep.from_jobs(plan("recipe=tiny_2bit", "quant.nbits=2,4")).name != name
    assert Sweep.from_jobs(plan("task=quantize", "quant.nbits=2,3")).name.startswith(
        "sweep-quantize-"
    )


def test_duplicate_runs_are_one_job():
    sweep = Sweep.from_jobs(plan("quant.nbits=2,3", "track.project=a,b"))
    assert [job.overrides for job in sweep.jobs] == [
        ["quant.nbits=2", "track.project=a"], ["quant.nbits=3", "track.project=a"],
    ]  # fmt: skip
    assert [job.overrides[-1] for job in sweep.duplicates] == ["track.project=b"] * 2


def test_the_swept_keys_are_those_that_differ():
    sweep = Sweep.from_jobs(plan("train.seed=1", "quant.nbits=2,3", "optim.lr=1e-3,2e-3"))
    assert sweep.swept_values(sweep.jobs[1]) == {"quant.nbits": "2", "optim.lr": "0.002"}


TOKEN = "hf_" + "aB3" * 11


def test_swept_values_are_shown_without_secrets():
    sweep = Sweep.from_jobs(
        plan(f"data.source=https://me:pw@host/x,{TOKEN},me:pw@host:x", "run.root=out")
    )
    assert [sweep.swept_values(job) for job in sweep.jobs] == [
        {"data.source": "https://***@host/x"}, {"data.source": "***"},
        {"data.source": "***@host:x"},
    ]  # fmt: skip
    assert not any("pw" in str(job) for job in sweep.jobs)
    assert [sweep.label(job) for job in sweep.jobs] == [
        "'data.source=https://***@host/x'", "'data.source=***'",
        "'data.source=***@host:x'",
    ]  # fmt: skip


def test_a_label_shows_what_distinguishes_a_job():
    sweep = Sweep.from_jobs(plan("train.seed=1", "quant.nbits=2,3", "track.project=a,b"))
    labels = [sweep.label(job) for job in [*sweep.jobs, *sweep.duplicates]]
    assert labels == [f"quant.nbits={n} track.project={p}" for p in "ab" for n in (2, 3)]
    (alone,) = Sweep.from_jobs(plan("quant.nbits=2")).jobs
    assert Sweep.from_jobs([alone]).label(alone) == alone.name


def test_launch_jobs_is_not_passed_to_a_job():
    (job, _) = Sweep.from_jobs(
        plan("launch.max_parallel_jobs=2", "quant.nbits=2,3", "run.root=out")
    ).jobs
    assert job.arguments[:2] == ["quant.nbits=2", "run.root=out"]
    with pytest.raises(
        UserError, match=r"^launch\.max_parallel_jobs=2: .* this is one run; leave it out"
    ):
        compose_command(["quant.nbits=2", "launch.max_parallel_jobs=2"], False)
    assert compose_command(["quant.nbits=2", "launch.max_parallel_jobs=2"], True).is_sweep


def test_no_more_jobs_run_in_parallel_than_exist():
    assert (
        Sweep.from_jobs(plan("quant.nbits=2,3", "launch.max_parallel_jobs=8")).num_parallel_jobs
        == 2
    )
