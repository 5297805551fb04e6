"""The progress bars: what each counts, and the signals that they let through."""

from types import SimpleNamespace

import pytest
import torch

from hqqtrain.common.errors import PreemptedError
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.tasks.datasets import load_held_out_data
from hqqtrain.tasks.progress import ProgressBars


class _Bar:
    """Notes its updates, as the context manager that `Console.progress_bar` returns."""

    def __init__(self, *settings: object) -> None:
        self.settings, self.updates = settings, []

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1, **postfix: object) -> None:
        self.updates.append((n, postfix))


class _Console:
    def __init__(self) -> None:
        self.bars: list[_Bar] = []

    def progress_bar(self, *settings: object) -> _Bar:
        self.bars.append(_Bar(*settings))
        return self.bars[-1]


@pytest.fixture
def console() -> _Console:
    return _Console()


@pytest.fixture
def progress_bars(console: _Console, make_config, start_run) -> ProgressBars:
    with start_run(make_config()) as run:
        return ProgressBars(console, run.runtime)


@pytest.mark.parametrize(("loads", "verb"), [(True, "loading"), (False, "quantizing")])
def test_layers(progress_bars: ProgressBars, console: _Console, loads: bool, verb: str):
    with progress_bars.show_quantizing(7, loads=loads) as on_layer:
        on_layer("q_proj")
    (bar,) = console.bars
    assert bar.settings == (verb, 7, "layer")
    assert bar.updates == [(1, {"layer": "q_proj"})]


def test_a_signal_stops_between_two_layers(progress_bars: ProgressBars, monkeypatch):
    def fail(_: PreemptionHandler) -> None:
        raise PreemptedError("SIGTERM was received")

    with progress_bars.show_quantizing(7, loads=False) as on_layer:
        on_layer("q_proj")
        monkeypatch.setattr(PreemptionHandler, "check_local", fail)
        with pytest.raises(PreemptedError):
            on_layer("k_proj")


def test_examples_that_are_tokenized(progress_bars: ProgressBars, console: _Console, monkeypatch):
    """A bar appears once it took some time, and counts what was done before."""
    now = iter([0.0, 1.0, 2.0, 3.1])
    monkeypatch.setattr("hqqtrain.tasks.progress.time.monotonic", lambda: next(now))
    examples = list("abcdef")
    assert list(progress_bars.count_tokenized(examples)) == examples
    (bar,) = console.bars
    assert bar.settings == ("tokenizing", 6, "example", 2)
    assert len(bar.updates) == 4


def test_small_data_has_no_bar(progress_bars: ProgressBars, console: _Console):
    assert list(progress_bars.count_tokenized("ab")) == ["a", "b"]
    assert console.bars == []


def test_steps(progress_bars: ProgressBars, console: _Console):
    metrics = {"train/loss": 2.5, "train/tokens_per_second": 100.0, "train/epoch": 0.5}
    progress_bars.advance_training(metrics)  # no bar yet: nothing to advance
    with progress_bars.show_training(10, steps_taken=4):
        progress_bars.advance_training(metrics)
    (bar,) = console.bars
    assert bar.settings == ("training", 10, "step", 4)
    assert bar.updates == [(1, {"loss": 2.5, "tokens/s": 100.0})]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_evaluated_tokens(console: _Console, make_config, start_run, ranks: int):
    with start_run(make_config()) as run:
        held_out = load_held_out_data(run, TINY_FOLDER)
    assert held_out is not None
    runtime = SimpleNamespace(comm=Communicator(0, ranks, torch.device("cpu")))
    progress_bars = ProgressBars(console, runtime)
    with progress_bars.show_evaluating(held_out) as advance:
        advance(12)
    (bar,) = console.bars
    assert bar.settings == ("evaluating", held_out.target_token_count, "token")
    assert bar.updates == [(12, {})]
