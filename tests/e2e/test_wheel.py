"""The wheel: its files, where it installs them, and that it works outside the checkout."""

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Return a fresh environment with only the wheel, without its dependencies."""
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    _run(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=venv.parent)
    return venv


def _site_packages(venv: Path) -> Path:
    (found,) = venv.glob("lib/python*/site-packages")
    return found


def test_it_has_all_files_of_a_run(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [
        *(f"hqqtrain/recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")),
        *(
            f"hqqtrain/models/tiny/{file.name}"
            for file in (ROOT / "hqqtrain/models/tiny").iterdir()
        ),
        *(
            f"hqqtrain/models/configs/{folder.name}/config.json"
            for folder in (ROOT / "hqqtrain/models/configs").iterdir()
        ),
        "hqqtrain/conf/config.yaml",
        "hqqtrain/launch/slurm/job.sh",
        "hqqtrain/conf/model/llama70b.yaml",
        "hqqtrain_kernels/__init__.py",
    ]
    assert [name for name in shipped if name not in names] == []
    assert not any(name.endswith(".pyc") or name.startswith("tests/") for name in names)


def test_it_adds_nothing_else_to_site_packages(installed):
    names = {path.name.partition("-")[0] for path in _site_packages(installed).iterdir()}
    assert names == {"hqqtrain", "hqqtrain_kernels"}


def test_it_works_from_anywhere(installed, tmp_path):
    ours = [Path(folder) for folder in site.getsitepackages()]
    (_site_packages(installed) / "dependencies.pth").write_text("\n".join(map(str, ours)))
    program = "import hqqtrain, hqqtrain_kernels; print(hqqtrain.__file__)"
    where = Path(_run(installed / "bin/python", "-c", program, cwd=Path("/")).strip())
    assert where.is_relative_to(installed)
    for command in ([installed / "bin/python", "-m", "hqqtrain"], [installed / "bin/hqqtrain"]):
        assert "tiny_2bit" in _run(*command, "--help", cwd=Path("/"))
        checked = _run(*command, "--check", "recipe=tiny_2bit", cwd=Path("/"))
        assert checked.startswith("runs/tiny_2bit-")
    mine = tmp_path / "recipes" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("defaults: [tiny_2bit, _self_]\nquant: {nbits: 3}\n")
    checked = _run(installed / "bin/hqqtrain", "--check", "recipe=mine", cwd=tmp_path)
    assert checked.startswith("runs/mine-")
