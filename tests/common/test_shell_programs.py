"""Every entry of the tables compiles, matches in linear time, and matches no empty text."""

import re
import time

import pytest

from hqqtrain.common import shell_programs

ENTRIES = [
    *shell_programs.OPTIONS,
    *shell_programs.OPTIONS.values(),
    *shell_programs.ARGUMENTS,
    *shell_programs.SETTINGS,
    *shell_programs.PAIRS,
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_is_a_bounded_pattern(entry: str) -> None:
    pattern = re.compile(entry)
    assert not pattern.fullmatch("")
    assert pattern.groups == 0, "the code around an entry counts its own groups"
    began = time.process_time()
    for text in ("mc alias set " + "a " * 2000, "redis-cli " + "-x " * 2000, "a-" * 4000):
        pattern.search(text)
    assert time.process_time() - began < 1


def test_a_word_that_reads_standard_input() -> None:
    pattern = re.compile(shell_programs.READERS, re.VERBOSE)
    for command in ("docker login --password-stdin", "gh secret set X", "passwd", "sudo -S ls"):
        assert pattern.search(command), command
    for command in ("cat file", "python train.py --login-page x", "sudo ls", "logins"):
        assert not pattern.search(command), command
