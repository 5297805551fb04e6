"""The console: bars or plain lines, no output on other ranks, and one results table."""

import io
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest

from hqqtrain.tracking import console
from hqqtrain.tracking.console import Console, ResultRow, has_color, results_table, setup_logging

HEADERS = ["model", "perplexity", "KL", "top-1", "bits per weight", "GiB", "seconds"]
ROWS = [
    ResultRow("full precision", 7.6146, None, None, 16.0, 0.0107),
    ResultRow("quantized", 15.3, 0.6312, 0.412, 2.5, 0.004, 1.33),
    ResultRow("trained", 9.875, 0.2, 0.7349, 2.5, 0.005, 88.0),
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


def test_the_table_shows_every_figure_and_a_dash_for_a_missing_one():
    lines = results_table(ROWS).splitlines()
    assert re.split(r"  +", lines[0].strip()) == HEADERS
    assert lines[2].split() == ["full", "precision", "7.615", "-", "-", "16.00", "0.011", "-"]
    assert lines[4].split() == ["trained", "9.875", "0.2000", "73.5%", "2.50", "0.005", "88.0"]


def test_results_go_to_standard_output_of_the_main_process_only(capsys):
    Console(is_main=False).print_results(ROWS, [Path("a")])
    assert capsys.readouterr() == ("", "")
    Console().print_results(ROWS, [Path("runs/x/adapter")], ["W&B: there"])
    assert capsys.readouterr().out.endswith("\nwrote runs/x/adapter\nW&B: there\n")


def test_a_terminal_gets_a_bar_with_its_postfix(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console().progress_bar("training", total=2, unit="step") as bar:
        bar.update(loss=2.3456789)
        bar.update(loss=1.5, rate="fast")
    assert "training: 100%" in terminal.getvalue()
    assert "loss=1.5, rate=fast" in terminal.getvalue()


def test_losses_of_a_training_stay_on_the_screen(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console().progress_bar("training", 50, "step", 10) as bar:
        for step in range(11, 51):
            bar.update(loss=step / 10)
    lines = [line for line in terminal.getvalue().split("\n") if "steps/s" in line]
    shown = [re.search(r"training: (\d+)/50 steps .*loss=([\d.]+)$", line) for line in lines]
    expected = [(step, step / 10) for step in (13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38, 40, 43,
                                               45, 48, 50)]  # fmt: skip
    assert [(int(match[1]), float(match[2])) for match in shown] == expected


def test_a_bar_leaves_no_line_without_need(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console().progress_bar("quantizing", 3, "layer") as bar:
        bar.update(3, layer="x")
    with Console(is_main=False).progress_bar("training", 3, "step") as bar:
        bar.update(3, loss=1.0)
    assert "layers/s" not in terminal.getvalue()
    assert "steps/s" not in terminal.getvalue()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Replace the monotonic clock; the list contains its current time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_early_then_every_minute_and_at_the_end(capsys, clock):
    with Console().progress_bar("training", total=300, unit="step") as bar:
        for _ in range(300):
            clock[0] += 1.0
            bar.update(loss=2.5, tokens_per_second=12345.6)
    lines = capsys.readouterr().err.splitlines()
    tail = "loss=2.5, tokens_per_second=12,346"
    assert lines[0] == f"training: 5/300 steps (2%), 1 steps/s, ETA 04:55, {tail}"
    assert [line.split("/")[0] for line in lines[1:-1]] == [
        f"training: {n}" for n in (65, 125, 185, 245)
    ]
    assert lines[-1] == f"training: 300/300 steps (100%), 1 steps/s, in 05:00, {tail}"


def test_a_slow_first_step_is_printed_at_once(capsys, clock):
    bar = Console().progress_bar("training", total=10, unit="step")
    clock[0] += 40.0
    bar.update()
    assert capsys.readouterr().err == "training: 1/10 steps (10%), 0.025 steps/s, ETA 06:00\n"


def test_the_rate_of_a_resumed_run_counts_its_own_steps_only(capsys, clock, monkeypatch):
    bar = Console().progress_bar("training", total=100, unit="step", initial=90)
    clock[0] += 10.0
    bar.update(5)
    assert capsys.readouterr().err == "training: 95/100 steps (95%), 0.5 steps/s, ETA 00:10\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console().progress_bar("training", total=100, unit="step", initial=90) as bar:
        pass
    assert "90/100" in terminal.getvalue()


def test_nothing_to_do_prints_nothing(capsys):
    with Console().progress_bar("training", total=8, unit="step", initial=8):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("setting", "is_colored"), [("", True), ("1", False)])
@pytest.mark.usefixtures("logging_restored")
def test_color_needs_a_terminal_and_no_no_color(monkeypatch, setting, is_colored):
    monkeypatch.setenv("NO_COLOR", setting)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_logging()
    with Console().progress_bar("training", total=2, unit="step") as bar:
        bar.update()
    logging.getLogger("hqqtrain.x").warning("careful")
    assert ("\033[33mwarning: \033[0mcareful" in terminal.getvalue()) is is_colored
    assert ("\033[3" in terminal.getvalue()) is is_colored
    assert "step/s" in terminal.getvalue()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True),
        ({"FORCE_COLOR": "0"}, False),
        ({"FORCE_COLOR": ""}, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_color_without_a_terminal_is_a_wish_of_the_user(monkeypatch, variables, expected):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    assert has_color(io.StringIO()) is expected
    assert has_color(Terminal()) is (expected or variables.get("FORCE_COLOR", "") in ("", "0"))


def test_a_pipe_never_gets_color(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with Console().progress_bar("training", total=1, unit="step") as bar:
        bar.update()
    Console().print_results(ROWS, [Path("a")])
    assert "\033" not in "".join(capsys.readouterr())


def test_other_ranks_are_silent_and_an_error_ends_the_line(capsys):
    with Console(is_main=False).progress_bar("x", total=1) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    bar = Console().progress_bar("x", total=3)
    with pytest.raises(ZeroDivisionError), bar:
        fail_after_one(bar)
    assert "x: 1/3 its (33%)" in capsys.readouterr().err


def test_without_a_total(capsys):
    with Console().progress_bar("reading", unit="row") as bar:
        bar.update(5)
    assert capsys.readouterr().err.startswith("reading: 5 rows, ")


@pytest.mark.usefixtures("logging_restored")
def test_the_main_process_logs_once_and_other_ranks_log_errors_only(capsys):
    logger = logging.getLogger("hqqtrain.some.module")
    for _ in range(2):
        setup_logging()
    logger.info("hello %d", 1)
    logger.warning("careful with %s", "https://me:pw@host")
    assert capsys.readouterr().err == "hello 1\nwarning: careful with https://***@host\n"
    logger.info("rows of %s", "a\x1b[2Kred.jsonl")
    assert capsys.readouterr().err == "rows of a\\x1b[2Kred.jsonl\n"
    setup_logging(is_main=False)
    logger.warning("careful")
    logger.error("broken")
    assert capsys.readouterr().err == "error: broken\n"


def fail_after_one(bar) -> None:
    bar.update()
    raise ZeroDivisionError


def test_the_last_step_is_one_line_however_slow(capsys, clock):
    with Console().progress_bar("training", 2, "step") as bar:
        for _ in range(2):
            clock[0] += 100
            bar.update()
    assert capsys.readouterr().err.count("2/2 steps") == 1
