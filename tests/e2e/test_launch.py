"""launch.sh with a stub for Python: what it installs and when, what it starts, what it returns.

`-m pip` and `-m venv` are always stubs. The command line and `accelerate launch` are real where a
test says so.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYTHON = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip "*" deepspeed") echo "$@" >>"$LOG"; exit "${DEEPSPEED:-0}" ;;
  "-m pytest"*|"-m pip "*) echo "$@" >>"$LOG" ;;
  "-m hqqtrain.distributed.rendezvous -m accelerate"*)
    echo "OMP_NUM_THREADS=$OMP_NUM_THREADS $@" >>"$LOG"
    if [ -n "${REAL:-}" ]; then exec "$REAL_PYTHON" "$@"; fi ;;
  "-m hqqtrain --check"*) exec "$REAL_PYTHON" "$@" ;;
  "-m hqqtrain"*) echo "$@" >>"$LOG" ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""
TASK = """
import os, signal, sys, time, types

CODE_FILE = os.environ.get("HQQTRAIN_EXIT_CODE", "")

def run_task(config, command):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM] * (config.train.seed == 3))
    sys.stdout.write(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\\n")
    sys.stdout.flush()
    if config.train.seed == 3:
        signal.sigwait([signal.SIGTERM])
        return 3
    if config.train.seed == 7:
        raise RuntimeError("a defect")
    is_culprit = os.environ["RANK"] == "1"
    while config.train.seed == 2 and not is_culprit and not os.path.getsize(CODE_FILE):
        time.sleep(0.01)  # this rank fails only after its peer has reported
    return {1: 3, 2: 2 if is_culprit else 1}.get(config.train.seed, 0)

tasks = types.ModuleType("hqqtrain.tasks.run")
tasks.run_task = run_task
sys.modules["hqqtrain.tasks"] = types.ModuleType("hqqtrain.tasks")
sys.modules["hqqtrain.tasks.run"] = tasks
"""


@dataclass
class Checkout:
    """A copy of the files that launch.sh needs, and the arguments its Python was called with."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def launch(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        process = self.start(*words, **env)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def start(self, *words: str, **env: str) -> subprocess.Popen:
        (self.folder / "log").unlink(missing_ok=True)
        return subprocess.Popen(
            [self.folder / "launch.sh", *words],
            cwd=self.folder,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def calls(self) -> list[str]:
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def program(self, name: str, text: str) -> None:
        """Write an executable into the virtual environment, which comes first in PATH."""
        file = self.folder / ".venv" / "bin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (folder / "fake").mkdir()
    (folder / "fake" / "sitecustomize.py").write_text(TASK)
    unset = ("RANK", "WORLD_SIZE", "NPROC", "NNODES", "OMP_NUM_THREADS", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= {
        "HQQTRAIN_PYTHON": str(python),
        "REAL_PYTHON": sys.executable,
        "LOG": str(folder / "log"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(folder / "fake"), env.get("PYTHONPATH", "")]),
    }
    return Checkout(folder, env)


@pytest.fixture
def ready(checkout) -> Checkout:
    """Return a checkout after its first start, so that everything is installed."""
    assert checkout.launch("--version").returncode == 0
    return checkout


def _pip(calls: list[str]) -> list[str]:
    return [call.split("constraints.txt ")[1] for call in calls if call.startswith("-m pip")]


def _torch_requirement() -> str:
    """Return the range of torch in pyproject.toml, which launch.sh repeats."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (found,) = (line for line in project["dependencies"] if line.startswith("torch>"))
    return found


def test_the_first_start_installs_torch_first_and_everything_with_constraints(checkout):
    done = checkout.launch()
    assert done.returncode == 0
    assert _pip(checkout.calls) == [
        _torch_requirement(),
        f"-e {checkout.folder}",
        "--no-build-isolation deepspeed",
    ]
    assert "setting up" in done.stderr
    assert checkout.calls[-1] == "-m hqqtrain recipe=tiny_2bit"


def test_the_second_start_installs_nothing_and_prints_nothing(ready):
    done = ready.launch()
    assert ready.calls == ["-m hqqtrain recipe=tiny_2bit"]
    assert done.stderr == ""


def test_the_second_start_is_fast(ready):
    ready.program("python", "exit 0")
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        ready.launch("--version")
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.3


def test_other_constraints_or_another_folder_install_again(ready, tmp_path):
    with (ready.folder / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    ready.launch()
    assert len(_pip(ready.calls)) == 3
    moved = Checkout(ready.folder.rename(tmp_path / "moved"), ready.env)
    moved.env["LOG"] = str(moved.folder / "log")
    moved.launch()
    assert len(_pip(moved.calls)) == 3


def test_an_interrupted_installation_is_repeated(checkout):
    checkout.program("python", 'case "$*" in *torch*) exit 1;; esac')
    assert checkout.launch().returncode == 1
    (checkout.folder / ".venv" / "bin" / "python").unlink()
    assert checkout.launch().returncode == 0
    assert len(_pip(checkout.calls)) == 3


def test_a_failed_build_of_deepspeed_is_a_warning(checkout):
    done = checkout.launch(DEEPSPEED="1")
    assert done.returncode == 0
    assert "deepspeed cannot be built here" in done.stderr
    checkout.launch()
    assert _pip(checkout.calls) == []


def test_an_unsuitable_python_is_refused(checkout):
    done = checkout.launch(HQQTRAIN_PYTHON="/bin/false")
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "/bin/false" in done.stderr


def test_arguments_are_passed_unchanged(ready):
    ready.launch("recipe=mine", "data.source='my file.txt'", "quant.overrides={*.o_proj:null}")
    assert ready.calls == [
        "-m hqqtrain recipe=mine data.source='my file.txt' quant.overrides={*.o_proj:null}"
    ]


def test_without_a_recipe_the_default_recipe_is_used(ready):
    ready.launch("quant.nbits=3")
    assert ready.calls == ["-m hqqtrain recipe=tiny_2bit quant.nbits=3"]


def test_texts_are_generated_by_one_process_that_needs_no_recipe(ready):
    ready.launch("task=generate", "model.name_or_path=runs/mine", NPROC="2")
    assert ready.calls == ["-m hqqtrain task=generate model.name_or_path=runs/mine"]
    ready.launch("task=generate", CUDA_VISIBLE_DEVICES="0,1")
    assert ready.calls == ["-m hqqtrain recipe=tiny_2bit task=generate"]


def test_the_test_command_runs_linters_first_and_pytest_last(checkout):
    for name in ("ruff", "mypy", "lint-imports", "shellcheck"):
        checkout.program(name, f'echo "{name} $*" >>"$LOG"')
    shutil.copy(checkout.folder / "python", checkout.folder / ".venv" / "bin" / "python")
    assert checkout.launch("test", "-k", "one").returncode == 0
    assert _pip(checkout.calls)[1] == f"-e {checkout.folder}[test]"
    assert [call.strip() for call in checkout.calls[3:]] == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "lint-imports",
        "shellcheck launch.sh .ci/run",
        "-m pytest -n 3 --dist loadfile --no-loadscope-reorder -k one",
    ]
    assert checkout.launch("--version").returncode == 0
    assert _pip(checkout.calls) == [], "an environment with test tools can run everything"
    checkout.program("ruff", "exit 1")
    assert checkout.launch("test").returncode == 1
    assert checkout.calls == []


@pytest.mark.parametrize(
    ("env", "processes"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,3"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a1, GPU-b2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1,3", "NPROC": "2"}, 2),
        ({"NPROC": "2"}, 2),
    ],
)
def test_several_processes_use_accelerate(ready, env, processes):
    assert ready.launch("recipe=tiny_2bit", **env).returncode == 0
    (call,) = ready.calls
    assert "-m accelerate.commands.launch --multi_gpu --num_machines 1" in call
    assert f"--num_processes {processes} " in call
    assert call.endswith("-m hqqtrain recipe=tiny_2bit")
    threads = int(call.split()[0].partition("=")[2])
    assert threads == max(1, (os.cpu_count() or 1) // processes)


@pytest.mark.parametrize("devices", ["", "-1", "0"])
def test_one_gpu_or_none_uses_one_process(ready, devices):
    ready.launch("recipe=tiny_2bit", CUDA_VISIBLE_DEVICES=devices)
    assert ready.calls == ["-m hqqtrain recipe=tiny_2bit"]


def test_nvidia_smi_gives_the_number_of_gpus(ready):
    ready.program("nvidia-smi", r'printf "GPU 0: X (UUID: a)\n  MIG 1g: y\nGPU 1: X (UUID: b)\n"')
    ready.env["PATH"] = f"{ready.folder / '.venv' / 'bin'}{os.pathsep}{ready.env['PATH']}"
    del ready.env["CUDA_VISIBLE_DEVICES"]
    ready.launch("recipe=tiny_2bit")
    assert "--num_processes 2 " in ready.calls[0]


def test_several_nodes(ready):
    env = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "2950"}
    ready.launch("recipe=tiny_2bit", NPROC="4", **env)
    for part in ("--num_machines 2", "--num_processes 8", "--machine_rank 1"):
        assert part in ready.calls[0]
    assert "--main_process_ip first" in ready.calls[0]
    assert "--main_process_port 2950" in ready.calls[0]
    done = ready.launch("recipe=tiny_2bit", NNODES="2")
    assert done.returncode == 1
    assert "set NODE_RANK (0 to 1) and MASTER_ADDR" in done.stderr


def test_a_mistake_is_one_message_before_anything_is_launched(ready):
    done = ready.launch("recipe=tiny_2bit", "quant.nbit=3", NPROC="2")
    assert done.returncode == 2
    assert ready.calls == []
    first, second, last = done.stderr.splitlines()
    assert "Did you mean 'quant.nbits'?" in first
    assert second.startswith("Keys of quant: ")
    assert "only checked once the configuration has no faults" in last


def test_a_sweep_is_started_as_one_process(ready):
    for words in (["recipe=sweep_bits"], ["recipe=tiny_2bit", "-m", "quant.nbits=2,3"]):
        ready.launch(*words, NPROC="2")
        assert ready.calls == [f"-m hqqtrain {' '.join(words)}"]


def test_a_slurm_job_is_submitted_by_one_process(ready):
    words = ["recipe=tiny_2bit", "launch=slurm", "launch.nodes=2"]
    ready.launch(*words, NPROC="2")
    assert ready.calls == [f"-m hqqtrain {' '.join(words)}"]


@pytest.mark.parametrize(("seed", "code"), [(1, 3), (2, 2), (7, 1)])
def test_the_exit_code_survives_accelerate(ready, seed, code):
    """Two processes under the real launcher; with seed 2 only rank 1 has the exit code 2.

    test_readme.py has the exit code 0.
    """
    done = ready.launch("recipe=tiny_2bit", f"train.seed={seed}", NPROC="2", REAL="1")
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_ranks_and_their_code_is_returned(ready, number):
    """A scheduler sends the signal to launch.sh alone."""
    process = ready.start("recipe=tiny_2bit", "train.seed=3", NPROC="2", REAL="1")
    assert process.stdout is not None
    started = [process.stdout.readline().strip() for _ in range(2)]
    assert sorted(started) == ["rank 0 of 2", "rank 1 of 2"]
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 3
