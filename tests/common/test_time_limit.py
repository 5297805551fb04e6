"""A pattern that never ends is interrupted, and the process's own alarm handler comes back."""

import re
import signal
import time

import pytest

from hqqtrain.common.time_limit import time_limit


def test_an_expensive_pattern_is_interrupted():
    handler, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(TimeoutError), time_limit(0.1):
        re.match("(a+)+$", "a" * 60 + "b")
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_body_in_time_is_not_interrupted():
    with time_limit(0.05):
        found = re.match("a+", "aa")
    time.sleep(0.1)
    assert found is not None
