"""The task that `task=` selects runs once; an error of it ends up in status.json."""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.config.run import TASKS
from hqqtrain.loading.plan import plan_model
from hqqtrain.tasks import dispatch
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.model import load_or_quantize, plan_settings


@pytest.fixture
def run_as(make_config, start_run, monkeypatch) -> Callable[[Callable[[Run], None]], int]:
    """Return a function that runs another function as `task=quantize`."""

    def run(task: Callable[[Run], None]) -> int:
        monkeypatch.setitem(dispatch._TASKS, "quantize", task)
        with warnings.catch_warnings():
            return dispatch.dispatch_task(make_config("quantize"), [])

    return run


def _load(run: Run) -> None:
    load_or_quantize(run, plan_model(plan_settings(run.config), run.runtime))


def _status(folder: Path) -> dict:
    return json.loads((folder / "runs" / "run" / "status.json").read_text())


def test_every_value_of_task_has_a_function():
    assert set(dispatch._TASKS) == set(TASKS)


def test_a_finished_run_does_not_run_again(run_as, tmp_path: Path, caplog):
    runs: list[Run] = []
    assert run_as(lambda run: runs.append(run) or _load(run)) == 0
    assert _status(tmp_path)["status"] == "done"
    with caplog.at_level(logging.INFO):
        assert run_as(runs.append) == 0
    assert len(runs) == 1
    assert "is done already" in caplog.text


def test_a_run_pushes_its_result_also_when_it_was_done(make_config, monkeypatch, hub, tmp_path):
    ran: list[Run] = []
    monkeypatch.setitem(dispatch._TASKS, "quantize", lambda run: ran.append(run) or _load(run))
    config = make_config("quantize", hub={"push": "bob/model"})
    with pytest.raises(UserError, match=r"^hub.push=bob/model: the token may not write there"):
        dispatch.dispatch_task(config, [])
    assert not (tmp_path / "runs").exists()  # it was found before the task
    for config.hub.push in ("alice/one", "alice/two"):
        assert dispatch.dispatch_task(config, []) == 0
    assert len(ran) == 1
    assert hub.repos["alice/one"].files.keys() == hub.repos["alice/two"].files.keys()
    assert "model.safetensors" in hub.repos["alice/two"].files


@pytest.mark.parametrize(("error", "status", "code"), [
    (PreemptedError("SIGUSR1 was received"), "preempted", 3), (UserError("bad text"), "failed", 2),
    (KeyError("defect"), "failed", 1),
])  # fmt: skip
def test_an_error_after_loading_is_recorded(run_as, tmp_path: Path, error, status: str, code: int):
    def fail(run: Run) -> None:
        _load(run)
        raise error

    with pytest.raises(type(error)):
        run_as(fail)
    status_json = _status(tmp_path)
    assert (status_json["status"], status_json["exit_code"]) == (status, code)
    assert str(error) in status_json["cause"]


def test_an_error_before_loading_leaves_nothing(run_as, tmp_path: Path):
    def fail(_: Run) -> None:
        raise UserError("a weight has NaN")

    with pytest.raises(UserError):
        run_as(fail)
    assert not (tmp_path / "runs").exists()


def test_running_out_of_memory_is_the_users_error_with_advice(run_as):
    def fail(_: Run) -> None:
        raise MemoryError

    with pytest.raises(UserError, match="Out of memory"):
        run_as(fail)
