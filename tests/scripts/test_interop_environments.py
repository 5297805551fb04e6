"""The environments of other programs are made once, in the given order of packages."""

from pathlib import Path

import pytest
from interop_environments import ENVIRONMENTS, main, make_environment


def test_packages_are_installed_in_order_and_once(tmp_path: Path, monkeypatch):
    installed = []
    monkeypatch.setattr(
        "interop_environments.venv.create", lambda folder, **_: folder.mkdir(exist_ok=True)
    )
    monkeypatch.setattr(
        "interop_environments.subprocess.run", lambda command, **_: installed.append(command[5:])
    )
    for _ in range(2):
        python = make_environment(tmp_path / "x", (("torch",), ("a", "b")))
    assert python == tmp_path / "x" / "bin" / "python"
    assert installed == [["torch"], ["a", "b"]]


def test_an_unknown_program_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["folder", "nothing"])
    assert f"nothing: choose from {', '.join(ENVIRONMENTS)}" in capsys.readouterr().err


def test_programs_and_tests_name_the_same_environments():
    programs = Path(__file__).parents[1] / "interop" / "programs"
    assert {file.name.split("_")[0] for file in programs.glob("*.py")} <= ENVIRONMENTS.keys()
