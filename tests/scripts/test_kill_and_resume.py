"""`scripts/kill_and_resume.py` kills at the moment that it reports."""

import random
import runpy
import subprocess
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_and_resume.py"


class AtOnce(random.Random):
    """Random numbers that are always the lower bound: kill as early as possible."""

    def randint(self, low, _):
        return low

    def uniform(self, low, _):
        return low


def test_a_partial_checkpoint_of_an_earlier_kill_is_ignored(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    left = tmp_path / "checkpoints" / ".step-00000003.partial"
    left.mkdir(parents=True)
    before = script["_half_written"](tmp_path)
    began = time.monotonic()
    process = subprocess.Popen(["sh", "-c", 'sleep 0.5; : >"$0/file"; exec sleep 60', str(left)])
    assert script["_kill"]([process], tmp_path, True, 0, AtOnce(), before)
    assert (left / "file").exists()
    assert time.monotonic() - began < 30


def test_a_start_that_saves_is_killed(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    saves = 'cd "$0"; for n in 1 2 3 4 5 6 7 8 9; do mkdir -p checkpoints/step-$n; sleep 1; done'
    process = subprocess.Popen(["sh", "-c", saves, str(tmp_path)])
    assert script["_kill"]([process], tmp_path, False, 60, AtOnce(), {})
    assert script["_newest"](tmp_path) == f"step-{script['SAVES']}"
