"""The console: bars or plain lines, silence on other ranks, one table."""

import io
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest

from hqqtrain.track import Console, ResultRow, console, results_table, setup_logging

HEADERS = ["model", "perplexity", "KL", "bits per weight", "GiB", "seconds"]
ROWS = [
    ResultRow("full precision", 7.6146, None, 16.0, 0.0107),
    ResultRow("quantized", 15.3, 0.6312, 2.5, 0.004, 1.33),
    ResultRow("trained", 9.875, 0.2, 2.5, 0.005, 88.0),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logging_restored():
    logger = logging.getLogger("hqqtrain")
    before = (logger.handlers[:], logger.level)
    with warnings.catch_warnings():
        yield
    logger.handlers[:], level = before
    logger.setLevel(level)


def test_the_table_has_every_figure_and_a_dash_for_none():
    lines = results_table(ROWS).splitlines()
    assert re.split(r"  +", lines[0].strip()) == HEADERS
    assert lines[2].split() == ["full", "precision", "7.615", "-", "16.00", "0.011", "-"]
    assert lines[4].split() == ["trained", "9.875", "0.2000", "2.50", "0.005", "88.0"]


def test_results_go_to_standard_output_of_the_main_process_only(capsys):
    Console(main=False).results(ROWS, [Path("a")])
    assert capsys.readouterr() == ("", "")
    Console().results(ROWS, [Path("runs/x/adapter")])
    assert "wrote runs/x/adapter" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_with_its_postfix(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console().progress("training", total=2, unit="step") as bar:
        bar.update(loss=2.3456789)
        bar.update(loss=1.5, rate="fast")
    assert "training: 100%" in terminal.getvalue()
    assert "loss=1.5, rate=fast" in terminal.getvalue()


def test_a_log_file_gets_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Console().progress("training", total=100, unit="step") as bar:
        for _ in range(100):
            now[0] += 1.0
            bar.update(loss=2.5, tokens_per_second=12345.6)
    lines = capsys.readouterr().err.splitlines()
    assert 6 <= len(lines) <= 8
    assert lines[-1] == "training: 100/100 (100%) step, 100 s, loss=2.5, tokens_per_second=12,346"


def test_other_ranks_and_an_error_inside_are_silent_and_clean(capsys):
    with Console(main=False).progress("x", total=1) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    bar = Console().progress("x", total=3)
    with pytest.raises(ZeroDivisionError), bar:
        fail_after_one(bar)
    assert "x: 1/3" in capsys.readouterr().err


def test_without_a_total(capsys):
    with Console().progress("reading", unit="rows") as bar:
        bar.update(5)
    assert "reading: 5 rows" in capsys.readouterr().err


@pytest.mark.usefixtures("logging_restored")
def test_logging_once_on_the_main_process_and_errors_only_elsewhere(capsys):
    logger = logging.getLogger("hqqtrain.some.module")
    for _ in range(2):
        setup_logging()
    logger.info("hello %d", 1)
    logger.warning("careful")
    assert capsys.readouterr().err == "hello 1\nwarning: careful\n"
    setup_logging(main=False)
    logger.warning("careful")
    logger.error("broken")
    assert capsys.readouterr().err == "error: broken\n"


def fail_after_one(bar) -> None:
    bar.update()
    raise ZeroDivisionError
