"""launch=slurm and srun with a real Slurm on this machine."""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from at_once import at_once
from cluster import NODES, Cluster, why_unavailable
from runs import SMALL

RANKS = (
    "import os; from hqqtrain.launch.slurm.ranks import set_rank_env_from_slurm;"
    "set_rank_env_from_slurm(os.environ);"
    "names = 'RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT'.split();"
    "print(*[os.environ.get(name, '-') for name in names])"
)

MORTAL = ("launch.partition=mortal", "launch.options=[--exclusive]")
"""A job has a node to itself, which its test may kill."""


def _stand_in(folder: Path) -> dict[str, str]:
    """Return an environment in which the fake tasks of stand_in.py replace the real ones."""
    (folder / "stand_in").mkdir(exist_ok=True)
    source = Path(__file__).with_name("stand_in.py")
    shutil.copy(source, folder / "stand_in" / "sitecustomize.py")
    path = [str(folder / "stand_in"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path)}


def _submit(cluster: Cluster, folder: Path, *words: str, **environ: str) -> str:
    """Run `python -m hqqtrain launch=slurm *words` in `folder`, and return the id of the job."""
    (job,) = _submit_all(cluster, folder, *words, **environ)
    return job


def _submit_all(cluster: Cluster, folder: Path, *words: str, **environ: str) -> list[str]:
    command = [sys.executable, "-m", "hqqtrain", "launch=slurm", *words]
    environ = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **environ}
    output = cluster.run(*command, cwd=folder, **environ)
    return re.findall(r"(?:submitted jobs? |then )(\d+)", output)


def _check_end(
    cluster: Cluster, job: str, state: str = "COMPLETED", exit_code: str = "0:0", restarts: int = 0
) -> None:
    """Wait for the end of a job, and check how it has ended."""
    ended = cluster.wait_for_job(job)
    found = (ended["JobState"], ended["ExitCode"], ended["Restarts"])
    assert found == (state, exit_code, str(restarts))


def _run_directory(folder: Path) -> Path:
    """Return the only run directory; `slurm` has the batch files."""
    (found,) = (path for path in (folder / "runs").iterdir() if path.name != "slurm")
    return found


def _output(folder: Path) -> str:
    return "\n".join(file.read_text() for file in (folder / "runs" / "slurm").glob("*.out"))


def _steps(folder: Path) -> list[int]:
    """Return the steps in metrics.jsonl so far."""
    files = (folder / "runs").glob("*/metrics.jsonl")
    complete = [line for file in files for line in file.read_text().split("\n")[:-1]]
    lines = [json.loads(line) for line in complete]
    return [line["train/global_step"] for line in lines if "train/loss" in line]


def test_the_reason_is_given_if_slurm_cannot_run(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "root" in why_unavailable()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert "no munged, slurmctld" in why_unavailable()


@pytest.mark.parametrize(
    ("there", "off"),
    [
        ((), ["munge", "slurmctld", "slurmd"]),
        (("munged",), ["slurmctld", "slurmd"]),
        (("munged", "slurmctld", "slurmd"), []),
    ],
)
def test_existing_services_are_left_alone(monkeypatch, there, off):
    """With fakes for the programs, one of which is always missing, and for apt-get."""
    called: list[tuple[str, ...]] = []
    known = {*there, "apt-get"}
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name, **_: name if name in known else None)
    monkeypatch.setattr("cluster._run_quietly", lambda *words: called.append(words))
    assert "no " in why_unavailable()
    assert [list(words[3:]) for words in called if words[0] == "systemctl"] == [off] * bool(off)
    assert any("slurm-wlm" in words for words in called)


@at_once
def test_tasks_of_srun_are_ranks(cluster, folder):
    output = cluster.run("srun", "-N2", "--ntasks-per-node=2", sys.executable, "-c", RANKS)
    ranks = sorted(line.split() for line in output.splitlines())
    assert [rank[:4] for rank in ranks] == [
        ["0", "4", "0", "2"], ["1", "4", "1", "2"], ["2", "4", "0", "2"], ["3", "4", "1", "2"],
    ]  # fmt: skip
    assert {rank[4] for rank in ranks} == {NODES[0]}
    assert len({rank[5] for rank in ranks}) == 1


@at_once
def test_two_jobs_use_different_ports(cluster, folder):
    outputs = [cluster.run("srun", "-n2", sys.executable, "-c", RANKS) for _ in range(2)]
    assert len({line.split()[5] for line in "\n".join(outputs).splitlines()}) == 2


@at_once
def test_a_shell_of_salloc_and_one_task_are_one_process(cluster, folder):
    for command in (("salloc", "-n2"), ("srun", "-n1")):
        assert cluster.run(*command, sys.executable, "-c", RANKS) == "- - - - - -"


@at_once
def test_a_batch_script_is_one_process(cluster, folder):
    script = folder / "script.sh"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{RANKS}"\n')
    cluster.run("sbatch", "--wait", "-n2", f"--output={folder}/script.out", str(script))
    assert (folder / "script.out").read_text().strip() == "- - - - - -"


@at_once
def test_ranks_of_another_launcher_are_left_alone(cluster, folder):
    output = cluster.run("srun", "-n2", "env", "RANK=5", sys.executable, "-c", RANKS)
    assert output.splitlines() == ["5 - - - - -"] * 2


@at_once
def test_a_job_that_receives_usr1_is_requeued_and_resumes(cluster, folder):
    job = _submit(cluster, folder, "launch.nodes=2", "train.seed=1", **_stand_in(folder))
    cluster.wait_until(lambda: len([*folder.glob("runs/*/starts-*")]) == 2)
    cluster.run("scancel", "--signal=USR1", job)
    _check_end(cluster, job, restarts=1)
    for rank in (0, 1):
        assert (_run_directory(folder) / f"starts-{rank}").read_text() == "0\n1\n"
    assert "preempted; requeued" in _output(folder)


@at_once
def test_a_job_of_higher_priority_preempts_another(cluster, folder):
    """Slurm sends SIGTERM and waits for the partition's GraceTime."""
    words = ("launch.nodes=2", "launch.tasks_per_node=2")
    low = ("launch.partition=low", "train.seed=1")
    job = _submit(cluster, folder, *words, *low, **_stand_in(folder))
    cluster.wait_until(lambda: len([*folder.glob("runs/*/starts-*")]) == 4)
    urgent = _submit(cluster, folder, *words, "launch.partition=urgent", **_stand_in(folder))
    _check_end(cluster, urgent)
    _check_end(cluster, job, restarts=1)


@at_once
def test_an_error_ends_the_job_with_its_exit_code(cluster, folder):
    job = _submit(cluster, folder, "train.seed=2", **_stand_in(folder))
    _check_end(cluster, job, "FAILED", "2:0")


@at_once
def test_a_job_that_never_saves_is_not_requeued_without_limit(cluster, folder):
    """Once with and once without a run directory."""
    jobs = [_submit(cluster, folder, f"train.seed={seed}", **_stand_in(folder)) for seed in (4, 5)]
    for job in jobs:
        _check_end(cluster, job, "FAILED", "3:0", restarts=1)
        (output,) = (folder / "runs" / "slurm").glob(f"*-{job}.out")
        assert "not requeued. Set a longer launch.time" in output.read_text()


@at_once
def test_a_job_that_saves_every_other_time_resumes(cluster, folder):
    job = _submit(cluster, folder, "train.seed=6", **_stand_in(folder))
    _check_end(cluster, job, restarts=3)


@at_once
def test_a_cancelled_job_stays_cancelled(cluster, folder):
    job = _submit(cluster, folder, "train.seed=1", **_stand_in(folder))
    cluster.wait_until(lambda: [*folder.glob("runs/*/starts-*")])
    cluster.run("scancel", job)
    ended = cluster.wait_for_job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


@at_once
def test_the_two_files_of_a_sweep_are_not_submitted_as_one(cluster, folder):
    words = ("launch=slurm", "-m", "train.seed=0,1", "launch.dry_run=true")
    printed = cluster.run(sys.executable, "-m", "hqqtrain", *words, cwd=folder)
    (folder / "both.sbatch").write_text(printed)
    with pytest.raises(AssertionError, match="does not look like a batch script"):
        cluster.run("sbatch", "both.sbatch", cwd=folder)


@at_once
def test_a_job_that_sbatch_refuses_is_one_message(cluster, folder):
    with pytest.raises(AssertionError, match=r"sbatch refuses .*invalid partition"):
        _submit(cluster, folder, "launch.partition=absent")


@at_once
def test_a_preempted_run_is_one_run(cluster, folder):
    """Two ranks on two nodes get USR1, which Slurm sends before a time limit."""
    words = (*SMALL, "train.max_steps=30", "track.backends=[wandb]", "launch.nodes=2")
    job = _submit(cluster, folder, *words)
    cluster.wait_until(lambda: len(_steps(folder)) >= 2)
    cluster.run("scancel", "--signal=USR1", job)
    _check_end(cluster, job, restarts=1)
    run = _run_directory(folder)
    assert json.loads((run / "summary.json").read_text())["run"]["world_size"] == 2
    assert _steps(folder) == list(range(1, 31)), "every step exactly once"
    offline = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(offline) == 2, "one for each start"
    assert {name.rpartition("-")[2] for name in offline} == {(run / "wandb/run_id").read_text()}


@at_once
def test_a_node_that_dies_costs_no_run(cluster, folder):
    """A real run that is killed and resumed is in e2e/test_resume.py."""
    job = _submit(cluster, folder, "train.seed=1", *MORTAL, **_stand_in(folder))
    cluster.wait_until(lambda: [*folder.glob("runs/*/starts-*")])
    node = cluster.job_record(job)["NodeList"]
    cluster.kill_node(node)
    _check_end(cluster, job, restarts=1)
    assert cluster.job_record(job)["NodeList"] != node
    assert (_run_directory(folder) / "starts-0").read_text() == "0\n1\n"


@at_once
def test_a_job_waits_for_processes_that_outlive_its_node(cluster, folder):
    """Slurm requeues a job whose node is silent, but its first start may still run there."""
    job = _submit(cluster, folder, "train.seed=1", *MORTAL, **_stand_in(folder))
    cluster.wait_until(lambda: [*folder.glob("runs/*/starts-*")])
    node = cluster.job_record(job)["NodeList"]
    cluster.silence_node(node)
    cluster.wait_until(lambda: "in use by another process, probably of an earl" in _output(folder))
    cluster.kill_node(node)
    _check_end(cluster, job, restarts=1)
    assert (_run_directory(folder) / "starts-0").read_text() == "0\n1\n"


@at_once
def test_the_table_waits_for_the_requeued_task_of_an_array(cluster, folder):
    words = ("-m", "train.seed=0,1", "launch.max_parallel_jobs=2")
    array, table = _submit_all(cluster, folder, *words, **_stand_in(folder))
    cluster.wait_until(lambda: len([*folder.glob("runs/*/starts-0")]) == 2)
    cluster.run("scancel", "--signal=USR1", f"{array}_1")
    _check_end(cluster, f"{array}_0")
    _check_end(cluster, f"{array}_1", restarts=1)
    _check_end(cluster, table)
    assert cluster.job_record(table)["StartTime"] >= cluster.job_record(f"{array}_1")["EndTime"]


@at_once
def test_the_table_shows_tasks_that_failed_or_were_preempted(cluster, folder):
    """Also tasks that left no run directory."""
    words = ("-m", "train.seed=0,2,5", "launch.max_parallel_jobs=3")
    _, table = _submit_all(cluster, folder, *words, **_stand_in(folder))
    _check_end(cluster, table)
    (results,) = folder.glob("runs/sweep-*/results.csv")
    with results.open(newline="") as lines:
        states = {row["train.seed"]: row["status"] for row in csv.DictReader(lines)}
    assert states == {"0": "done", "2": "failed", "5": "preempted"}


@at_once
def test_a_sweep_is_an_array_and_ends_with_its_table(cluster, folder):
    words = ("-m", "quant.nbits=2,3", "launch.max_parallel_jobs=2")
    array, table = _submit_all(cluster, folder, *words, **_stand_in(folder))
    for job in (f"{array}_0", f"{array}_1", table):
        _check_end(cluster, job)
    (results,) = folder.glob("runs/sweep-*/results.csv")
    assert len(results.read_text().splitlines()) == 3
