"""Text that the console cannot take is dropped; every case is a process with real streams."""

import io
import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys
from hqqtrain.common.stdio import open_missing_streams, tolerate_lost_errors, tolerate_lost_output
open_missing_streams()
tolerate_lost_errors()
tolerate_lost_output()
for _ in range(3):
    print("out" * 10_000)
    print("err" * 10_000, file=sys.stderr, flush=True)
    logging.warning("a warning")
with open(sys.argv[1], "w") as file:
    file.write("done")
sys.exit(7)
"""


def _run(redirection: str, folder) -> tuple[int, str, str]:
    """Return exit code, output and what the program has written to its file."""
    file = folder / "result"
    command = f'"$0" -c "$1" "$2" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM, str(file)],
        capture_output=True, text=True, timeout=30, env={**os.environ},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, file.read_text()


@pytest.mark.parametrize(
    "redirection",
    ["| true", "| head -c 1", "2>&1 | true", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1",
     ">&-", "2>&-", "<&- >&- 2>&-"],
)  # fmt: skip
def test_the_program_ends_with_its_own_exit_code_and_its_file(redirection, tmp_path):
    code, _, result = _run(redirection, tmp_path)
    assert (code, result) == (7, "done")


def test_the_loss_is_reported_once_on_the_other_stream(tmp_path):
    output = _run(">/dev/full 2>&1", tmp_path)[1] + _run("| true", tmp_path)[1]
    assert output.count("standard output cannot be written to") == 1  # the first has no stream left


def test_output_that_the_console_can_take_is_complete(tmp_path):
    output = _run("", tmp_path)[1]
    assert output.count("out") == output.count("err") == 30_000
    assert output.count("a warning") == 3


def test_a_name_that_the_encoding_lacks_is_escaped(tmp_path):
    program = (
        "from hqqtrain.common.stdio import tolerate_lost_output; tolerate_lost_output();"
        "print('r\\u00e9sum\\u00e9')"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=env)
    assert (done.returncode, done.stdout) == (0, rb"r\xe9sum\xe9" + b"\n")


def test_a_stream_that_a_caller_has_replaced_stays(capsys):
    from hqqtrain.common.stdio import tolerate_lost_output

    replaced = sys.stdout
    tolerate_lost_output()
    assert sys.stdout is replaced


@pytest.mark.parametrize("name", ["résumé", os.fsdecode(b"bad\xff")])
def test_a_command_that_only_prints_escapes_a_name_too(monkeypatch, name):
    from hqqtrain.common.stdio import escape_unencodable

    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, "ascii"))
    escape_unencodable()
    sys.stdout.write(name)
    sys.stdout.flush()
    assert buffer.getvalue().decode("ascii") == ascii(name).strip("'")
