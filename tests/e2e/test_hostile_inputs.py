"""More than a hundred hostile or broken inputs: one message and exit code 2, or the right result.

None may take 10 seconds or 2 GB more than a right input does, leave a process waiting, or end with
a traceback.
"""

import time
from pathlib import Path

import hostile_config
import hostile_data
import hostile_model
import hostile_results
import pytest
from hostile import Inputs, save_model, save_texts
from runs import run

SECONDS, GIB = 20, 2
"""Limits of a case. A right input takes at most 10 s, also on a machine that is busy."""

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {
        "config": hostile_config.CASES,
        "model": hostile_model.CASES,
        "data": hostile_data.CASES,
        "run": hostile_results.RUNS,
        "adapter": hostile_results.ADAPTERS,
    }.items()
    for name, case in cases.items()
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and a finished run."""
    folder = tmp_path_factory.mktemp("prepared")
    save_model(folder / "model")
    save_texts(folder)
    done = run(*Inputs(folder, folder).words, "run.name=run", root=folder / "runs")
    assert done.code == 0, done.output
    return folder


@pytest.mark.parametrize("name", CASES)
def test_one_message_or_the_right_result(name: str, prepared: Path, tmp_path: Path):
    make, expected = CASES[name]
    inputs = Inputs(tmp_path, prepared)
    words = make(inputs) if callable(make) else make
    began = time.monotonic()
    done = run(*inputs.words, *words, root=tmp_path / "runs", limit=SECONDS, max_gib=GIB)
    assert time.monotonic() - began < SECONDS, done.output
    assert done.code == (2 if expected else 0), done.output
    assert "Traceback" not in done.output
    if expected:
        _, _, message = done.output.rpartition("hqqtrain: error: ")
        for word in expected:
            assert word in message


def test_the_table_has_a_hundred_inputs():
    assert len(CASES) >= 100
