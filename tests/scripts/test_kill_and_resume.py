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
    steps = " ".join(map(str, range(1, script["SAVES"] + 1)))
    saves = f'cd "$0"; for n in {steps}; do sleep 2; mkdir -p checkpoints/step-$n; done; sleep 100'
    process = subprocess.Popen(["sh", "-c", saves, str(tmp_path)])
    started = time.monotonic()
    assert script["_kill"]([process], tmp_path, False, 60, AtOnce(), {})
    assert time.monotonic() - started < 50  # killed after its saves, not when patience ended
    assert script["_newest"](tmp_path) == f"step-{script['SAVES']}"
