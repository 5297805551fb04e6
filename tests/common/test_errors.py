"""Errors that the command line shows as a message, and the exit codes that go with them."""

import pytest

from hqqtrain import cli
from hqqtrain.common.errors import (
    DONE,
    FAILED,
    PREEMPTED,
    USER_ERROR,
    PreemptedError,
    RankLostError,
    UserError,
    did_you_mean,
)


def test_exit_codes_are_those_that_the_documentation_promises():
    """Batch files, launch.sh and users' scripts compare with these numbers."""
    assert (DONE, FAILED, USER_ERROR, PREEMPTED) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("error", "code", "begin"),
    [
        (UserError("quant.nbits=5: wrong"), USER_ERROR, "hqqtrain: error: quant.nbits=5"),
        (UserError("https://me:pw@host: wrong"), USER_ERROR, "hqqtrain: error: https://***@host"),
        (PreemptedError("SIGUSR1 received"), PREEMPTED, "hqqtrain: SIGUSR1"),
        (RankLostError("rank 1 has failed"), FAILED, "hqqtrain: error: rank 1"),
        (KeyboardInterrupt(), FAILED, "hqqtrain: interrupted"),
    ],
)
def test_an_error_ends_the_command_with_its_code_and_no_traceback(
    error, code, begin, monkeypatch, capsys
):
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run_command", fail)
    assert cli.main(["task=eval"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(begin)
    assert str(error).replace("me:pw", "***") in line


def test_did_you_mean_is_silent_when_nothing_is_near():
    assert did_you_mean("nbit", ["nbits", "axis"]) == " Did you mean 'nbits'?"
    assert did_you_mean("zzz", ["nbits", "axis"]) == ""
    assert did_you_mean("", []) == ""


def test_did_you_mean_reads_an_iterator_once():
    assert did_you_mean("axi", iter(["nbits", "axis"])) == " Did you mean 'axis'?"
