"""Every command of the README and of docs/commands.md and docs/sweeps.md runs, in seconds."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import HELD_OUT, TEXT, free_port, run_in
from small_model import small_model

from hqqtrain.models.source import TINY_FOLDER

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
QUICK = (
    "train.max_steps=1", "train.global_batch_size=2", "train.max_seq_len=64", "eval.tokens=256",
    "eval.samples=0", "optim.warmup_steps=0", "track.backends=[]", f"data.source={TEXT}",
    f"eval.source={HELD_OUT}", "quant.calibration=null",
)  # fmt: skip

SHORT_TEXT = ("generate.prompt=x", "generate.max_new_tokens=4")


PAGES = ("README.md", "docs/commands.md", "docs/sweeps.md")


def commands() -> list[str]:
    """Return the lines of the bash blocks of all pages, in order, without their comments."""
    blocks = [block for page in PAGES for block in (ROOT / page).read_text().split("```bash\n")[1:]]
    lines = [line for block in blocks for line in block.split("```")[0].splitlines() if line]
    return [line.partition("  # ")[0] for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the working directory of all commands, with the reader's own model and text.

    Later commands use the files of earlier ones.
    """
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(TINY_FOLDER, folder / "my-model")
    rows = Path(TEXT).read_text().split("\n\n")
    (folder / "my-data.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows if row.strip())
    )
    return folder


def test_the_first_block_has_the_two_commands_to_start_with():
    top = (ROOT / "README.md").read_text().split("```")[1]
    assert top.splitlines()[1:] == commands()[:2] == top.split("\n")[1:3]


@pytest.mark.parametrize("number", range(len(commands())))
def test_command(number: int, folder: Path):
    line = commands()[number]
    words = shlex.split(line.replace("./launch.sh", str(ROOT / "launch.sh")))
    if "test" in words:
        words.append("--version")
    elif "pip" in words:  # build the package, but neither download nor install anything
        words[-1:] = ["--dry-run", "--no-deps", "--no-build-isolation", "--no-index", str(ROOT)]
    elif "--help" not in words:
        given = {word.partition("=")[0] for word in words}
        words += [word for word in QUICK if word.partition("=")[0] not in given]
        # In place of a large model or none, and in each of several processes.
        if "model.name_or_path" not in given and (
            "recipe=tiny_2bit" not in words or {"-m", "torchrun", "NPROC=2"} & {words[0], words[3]}
        ):
            words.append(f"model.name_or_path={small_model()}")
    words += SHORT_TEXT if "task=generate" in words else ()
    if "recipe=sweep_bits" in words:
        words += ["quant.nbits=2", "quant.group_size=64"]  # one of its twelve jobs
    if "-m" in words[3:]:
        words.append("quant.nbits=2")  # one of its two jobs
    if "accelerate" in words:
        words[2:2] = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                      "--main_process_port", str(free_port())]  # fmt: skip
    if "torchrun" in words:
        words[1:1] = ["--master-port", str(free_port())]
    words = [word for word in words if word != "OMP_NUM_THREADS=1"]  # all tests have it
    if words[:3] == ["python", "-m", "hqqtrain"]:
        done = run_in(folder, *words[3:])
        assert done.code == 0, done.output
        return
    done = subprocess.run(
        ["env", *words], cwd=folder, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_every_command_of_the_readme_but_the_first_two_has_a_comment():
    blocks = (ROOT / "README.md").read_text().split("```bash\n")[2:]
    lines = [line for block in blocks for line in block.split("```")[0].splitlines() if line]
    assert lines
    assert all("  # " in line for line in lines)


def test_the_python_of_the_readme_runs(folder: Path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "def add(a, b):" in done.stdout


def test_accelerate_launch_started_two_processes_on_a_cpu(folder: Path):
    (summary,) = folder.glob("runs/llama70b_2bit-*/summary.json")
    assert json.loads(summary.read_text())["run"]["world_size"] == 2


def test_the_tree_of_the_repository_names_existing_files():
    tree = (ROOT / "docs" / "repository.md").read_text().split("```")[1]
    for line in tree.splitlines():
        for word in line.strip().split("   ")[0].replace(",", " ").split():
            inside = ROOT / "hqqtrain" if line.startswith("  ") else ROOT
            assert (inside / word).exists() or (inside / f"{word}.py").exists(), word
