"""Submission: the arguments of sbatch, the files that are kept, and the messages to the user."""

import json
import os
import sys
from pathlib import Path

import pytest

from hqqtrain.cli import main

SBATCH = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=file)
if sys.argv[-1].endswith(os.environ.get("REFUSED", "nothing")):
    sys.exit("sbatch: error: invalid partition specified: absent")
print("70{{}};cluster".format(sum(1 for _ in open(os.environ["CALLS"]))))
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Install a fake sbatch; return a function that lists (arguments, environment) per call."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.chdir(tmp_path)
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def test_a_run_is_submitted_and_its_batch_file_is_kept(calls, capsys):
    assert main(["launch=slurm", "run.name=mine"]) == 0
    message = capsys.readouterr().out
    assert message == "submitted job 701: runs/mine; its output: runs/slurm\n"
    ((arguments, _),) = calls()
    assert arguments == ["--parsable", "runs/slurm/mine.sbatch"]
    assert os.listdir("runs/slurm") == ["mine.sbatch"]


def test_a_job_inherits_no_ranks_and_no_slurm_variables(calls, monkeypatch):
    for name in ("RANK", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_CONF", "HF_HOME"):
        monkeypatch.setenv(name, "1")
    assert main(["launch=slurm"]) == 0
    ((_, environ),) = calls()
    assert {"SLURM_CONF", "HF_HOME"} <= environ.keys()
    assert not {"RANK", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"} & environ.keys()


def test_a_sweep_is_an_array_and_a_dependent_table_job(calls, capsys):
    assert main(["launch=slurm", "-m", "quant.nbits=2,3", "run.root=out"]) == 0
    assert capsys.readouterr().out.startswith("submitted jobs 701_[0-1], then 702;")
    (array, _), (table, _) = calls()
    assert len(array) == 2
    assert table[:2] == ["--parsable", "--dependency=afterany:701"]
    text = Path(table[2]).read_text()
    assert text.endswith("-m hqqtrain --table -m quant.nbits=2,3 run.root=out\n")


def test_the_error_of_sbatch_is_passed_on(calls, capsys, monkeypatch):
    monkeypatch.setenv("REFUSED", "mine.sbatch")
    assert main(["launch=slurm", "launch.partition=absent", "run.name=mine"]) == 2
    assert "invalid partition specified: absent" in capsys.readouterr().err


def test_a_refused_table_leaves_the_runs_and_says_so(calls, capsys, monkeypatch):
    monkeypatch.setenv("REFUSED", "-table.sbatch")
    assert main(["launch=slurm", "-m", "quant.nbits=2,3"]) == 2
    assert "The runs are submitted; scancel 701 cancels them." in capsys.readouterr().err


TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    "words",
    [
        ["data.source=https://me:pw@host/x"],
        ["-m", "quant.nbits=2,3", f"data.source={TOKEN}"],
        [f"launch.setup=[module x,'export HF_TOKEN={TOKEN}']"],
        ["launch.setup=['module x; export MY_PASSWORD=pw']"],
        ["launch.setup=['export MY_PASSWORD=pw HF_TOKEN=$X']"],
        ["launch.options=['--export=ALL,MY_TOKEN=pw']"],
        ["recipe=far"],
        ["recipe=swept"],
    ],
)
def test_no_secret_reaches_a_batch_file(calls, tmp_path, capsys, monkeypatch, words):
    monkeypatch.setenv("HQQTRAIN_RECIPES", str(tmp_path))
    (tmp_path / "far.yaml").write_text("launch: {setup: [export MY_PASSWORD=pw]}\n")
    (tmp_path / "swept.yaml").write_text("sweep: {data.source: 'a,https://me:pw@host/x'}\n")
    assert main(["launch=slurm", *words]) == 2
    message = capsys.readouterr().err
    assert "would contain a secret" in message
    assert "***" in message
    assert "export NAME=$(cat FILE)" in message
    assert "pw" not in message
    assert TOKEN not in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "line",
    ["export HF_TOKEN=$(cat ~/.token)", 'export HF_TOKEN="$OTHER" X=1',
     "export HF_TOKEN=$A;export B=$HF_TOKEN",
     "export HF_HUB_OFFLINE=1; cd /scratch/hf_checkpoints"],
)  # fmt: skip
def test_a_reference_to_a_secret_is_allowed(calls, capsys, line):
    assert main(["launch=slurm", f"launch.setup=['{line}']"]) == 0
    (file,) = Path("runs/slurm").iterdir()
    assert f"\n{line}\n" in file.read_text()


def test_a_backslash_that_would_lose_the_job_is_refused(calls, tmp_path, capsys):
    assert main(["launch=slurm", "run.root=a\\b"]) == 2
    assert "run.root=a\\b: sbatch gives a backslash" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["bin"]


@pytest.mark.parametrize("key", ["run.root", "launch.partition", "launch.account"])
def test_no_value_can_start_a_new_line(calls, tmp_path, capsys, key):
    assert main(["launch=slurm", f"{key}='a\n#SBATCH --uid=0\ntouch broken'"]) == 2
    assert f"{key}='a\\n" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["bin"]


def test_without_sbatch(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch=slurm"]) == 2
    assert "no sbatch on this machine" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(calls, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["launch=slurm", "run.root=file/x"]) == 2
    assert "run.root=file/x: cannot be written to" in capsys.readouterr().err


def test_several_ranks_do_not_submit(calls, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["launch=slurm"]) == 2
    assert "one process" in capsys.readouterr().err


def test_check_of_a_slurm_job_says_so(capsys):
    assert main(["--check", "launch=slurm", "run.name=mine"]) == 0
    assert capsys.readouterr().out.splitlines() == ["slurm job:", "runs/mine"]
