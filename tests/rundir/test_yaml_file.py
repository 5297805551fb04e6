"""Hostile files in a run directory: one message, in bounded time and memory."""

import os
import resource
import time

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.rundir.yaml_file import read_yaml

BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "\n".join(
    f"{chr(c + 1)}: &{chr(c + 1)} [{','.join([f'*{chr(c)}'] * 10)}]" for c in range(97, 110)
)
HOSTILE = {
    "anchors": BOMB,
    "nested brackets": "a: " + "[" * 500_000,
    "nested braces": "{a: " * 100_000,
    "nested lists": "- " * 100_000,
    "nested keys": "? " * 100_000,
    "nested blocks": "\n".join(" " * n + "a:" for n in range(1000)),
    "merged": "a: &a {x: 1}\nb: {<<: *a}",
    "itself": "a: &a [*a]",
    "sexagesimal": "a: 1" + ":1" * 200_000,
    "digits": "a: " + "9" * 5000,
    "binary": "a: 0b" + "1" * 500_000,
    "large": "a: x\n" * 300_000,
    "tag": "a: !!python/object/apply:os.system [true]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_short_message(tmp_path, name):
    (tmp_path / "config.yaml").write_text(HOSTILE[name])
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read \(") as caught:
        read_yaml(tmp_path / "config.yaml")
    assert len(str(caught.value)) < 700
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 19  # KiB


def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        read_yaml(tmp_path / "config.yaml")
