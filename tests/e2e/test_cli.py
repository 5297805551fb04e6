"""The command line as a user sees it: output, speed, exit codes and sweeps."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs import fake_task_module

FAKE_TASK = """
import os, pathlib, sys
def run_task(config, command):
    folder = pathlib.Path(config.run.root) / config.run_name()
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(
        '{"quantize": {"bits_per_weight": 2.5}, "eval": {"final": {"perplexity": 9.25}}}')
    print("job", os.getpid(), *command, flush=True)
    if config.quant.nbits == 3:
        from hqqtrain.common.errors import UserError
        raise UserError("data.source=x: no such file.")
    return {2: 0, 1: 1, 8: 3}.get(config.quant.nbits, 0)
"""


def _hqqtrain(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hqqtrain", *words],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def fake_task(tmp_path) -> dict[str, str]:
    """Return an environment in which the task is a stub, to test the command line alone."""
    return fake_task_module(tmp_path / "fake", FAKE_TASK)


def _is_empty(folder: Path) -> bool:
    return list(folder.iterdir()) == []


def test_no_arguments_print_the_help(tmp_path):
    plain, asked = _hqqtrain(cwd=tmp_path), _hqqtrain("--help", cwd=tmp_path)
    assert plain.returncode == asked.returncode == 0
    assert plain.stdout == asked.stdout
    assert "recipe=tiny_2bit" in plain.stdout
    assert _is_empty(tmp_path)


def test_check_prints_the_run_directory_and_writes_nothing(tmp_path):
    done = _hqqtrain("--check", "recipe=tiny_2bit", "run.root=there", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("there/tiny_2bit-")
    assert len(done.stdout.splitlines()) == 1
    assert _is_empty(tmp_path)


def test_check_of_a_sweep_lists_its_jobs(tmp_path):
    done = _hqqtrain("--check", "recipe=sweep_bits", cwd=tmp_path)
    title, *jobs = done.stdout.splitlines()
    assert title == "sweep of 12 jobs:"
    assert [job.split()[-2:] for job in jobs] == [
        [f"quant.nbits={nbits}", f"quant.group_size={size}"]
        for nbits in (4, 3, 2, 1)
        for size in (32, 64, 128)
    ]


def test_cfg_is_yaml_that_can_be_a_recipe(tmp_path):
    done = _hqqtrain("--cfg", "recipe=tiny_2bit", "quant.overrides={*.o_proj:null}", cwd=tmp_path)
    assert yaml.safe_load(done.stdout)["quant"]["overrides"] == {"*.o_proj": None}
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "copy.yaml").write_text(done.stdout)
    again = _hqqtrain("--cfg", "recipe=copy", cwd=tmp_path)
    assert yaml.safe_load(again.stdout) == yaml.safe_load(done.stdout)


def test_cfg_as_in_hydra(tmp_path):
    plain = _hqqtrain("--cfg", "quant.nbits=2", cwd=tmp_path).stdout
    for words in (["-c"], ["-c", "job"], ["--cfg", "job"]):
        assert _hqqtrain(*words, "quant.nbits=2", cwd=tmp_path).stdout == plain


def test_version(tmp_path):
    assert _hqqtrain("--version", cwd=tmp_path).stdout.startswith("hqqtrain 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quant.nbit=2"], "hqqtrain: error: quant.nbit: unknown key. Did you mean 'quant.nbits'?"),
        (
            ["recipe=tiny"],
            "hqqtrain: error: recipe=tiny: no such recipe. Did you mean 'tiny_chat'?",
        ),
        (["quant.nbits=5"], "hqqtrain: error: quant.nbits=5: allowed are 8, 4, 3, 2, 1, null."),
        (
            ["tiny_2bit"],
            "hqqtrain: error: tiny_2bit: must be key=value. Did you mean 'recipe=tiny_2bit'?",
        ),
        (
            ["--chek", "quant.nbits=2"],
            "hqqtrain: error: --chek: unknown option. Did you mean '--check'?",
        ),
        (["-c", "hydra"], "hqqtrain: error: -c hydra: -c prints the configuration of the run"),
        (["job"], "hqqtrain: error: job: must be key=value."),
        (["quant.nbits=2,3"], "a sweep needs -m"),
        (
            ["run.resume=https://me:pw@host"],
            "hqqtrain: error: run.resume=https://***@host: allowed are",
        ),
        (["-m", "quant.nbits=2,7"], "hqqtrain: error: quant.nbits=7: allowed are"),
        (
            ["-m", "quant.nbits=2,3", "run.name=x"],
            "hqqtrain: error: run.name=x: every job of a sweep",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, words, message):
    done = _hqqtrain(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert _is_empty(tmp_path)


def test_only_the_first_rank_prints_an_error(tmp_path):
    assert _hqqtrain("quant.nbits=5", cwd=tmp_path, RANK="0").stderr
    other = _hqqtrain("quant.nbits=5", cwd=tmp_path, RANK="1")
    assert (other.returncode, other.stderr) == (2, "")


def test_every_rank_passes_the_exit_code_of_a_mistake_to_the_launcher(tmp_path):
    for rank in ("0", "1"):
        file = tmp_path / f"code{rank}"
        _hqqtrain("quant.nbits=5", cwd=tmp_path, RANK=rank, HQQTRAIN_EXIT_CODE=str(file))
        assert file.read_text() == "2"


def test_a_sweep_under_a_launcher_is_refused(tmp_path):
    done = _hqqtrain("-m", "quant.nbits=2,3", cwd=tmp_path, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2
    assert "./launch.sh" in done.stderr


def test_composing_imports_no_torch_and_no_hydra_folder_appears(tmp_path):
    program = (
        "import sys; from hqqtrain.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys();"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    for words in (["--help"], ["--check", "recipe=llama70b_2bit"], ["--cfg", "recipe=sweep_bits"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert _is_empty(tmp_path)


@pytest.mark.parametrize("words", [["--help"], ["--check", "recipe=tiny_2bit"], ["--cfg"]])
def test_options_that_only_print_are_fast(tmp_path, words):
    def seconds() -> float:
        began = time.monotonic()
        assert _hqqtrain(*words, cwd=tmp_path).returncode == 0
        return time.monotonic() - began

    assert any(seconds() < 1.5 for _ in range(3))  # on a busy machine one of three


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    command = f"{sys.executable} -m hqqtrain --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_task_receives_config_and_command_and_returns_the_exit_code(tmp_path, fake_task):
    for nbits, code in ((2, 0), (1, 1), (8, 3), (3, 2)):
        done = _hqqtrain(f"quant.nbits={nbits}", "run.root=out", cwd=tmp_path, **fake_task)
        assert done.returncode == code
        assert f"quant.nbits={nbits} run.root=out" in done.stdout
    assert "hqqtrain: error: data.source=x: no such file." in done.stderr
    assert "Traceback" not in done.stderr


def test_the_launcher_receives_exit_codes_2_and_3(tmp_path, fake_task):
    for nbits, reported in ((2, ""), (1, ""), (8, "3"), (3, "2")):
        file = tmp_path / "code"
        file.write_text("")
        words = (f"quant.nbits={nbits}", "run.root=out")
        _hqqtrain(*words, cwd=tmp_path, HQQTRAIN_EXIT_CODE=str(file), **fake_task)
        assert file.read_text() == reported


def test_a_sweep_runs_each_job_in_a_process_and_continues_after_a_failure(tmp_path, fake_task):
    done = _hqqtrain("-m", "quant.nbits=1,2,4", "run.root=out", cwd=tmp_path, **fake_task)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len({line.split()[1] for line in lines if line.startswith("job ")}) == 3
    assert any("sweep 1/3: quant.nbits=1: failed with exit code 1" in x for x in lines)
    success = "sweep 2/3: quant.nbits=2: done: 2.50 bits per weight, perplexity 9.250 trained"
    assert any(success in line for line in lines)
    assert done.stderr.startswith("hqqtrain: error: quant.nbits=1: failed; see out/finetune-")
    assert len(done.stderr.splitlines()) == 1


def test_a_sweep_recipe_needs_no_flag_and_returns_0(tmp_path, fake_task):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("sweep: {quant.group_size: '32,64'}\n")
    done = _hqqtrain("recipe=mine", "quant.nbits=2", "run.root=out", cwd=tmp_path, **fake_task)
    assert done.returncode == 0
    assert len(list((tmp_path / "out").glob("mine-*"))) == 2
    assert len(list((tmp_path / "out").glob("sweep-mine-*/results.csv"))) == 1


def test_a_preempted_job_ends_the_sweep_with_3(tmp_path, fake_task):
    done = _hqqtrain("-m", "quant.nbits=8,2", "run.root=out", cwd=tmp_path, **fake_task)
    assert done.returncode == 3
    assert "2/2" not in done.stdout
