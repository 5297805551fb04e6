"""SIGUSR1 and SIGTERM: heard from the first moment, acted upon where all ranks meet.

Importing torch takes seconds, in which a signal would else end the process without a word. A
thread listens: Python's own handlers have to wait while the main thread is in a collective, which
may be one that never ends.
"""

import os
import signal
import threading
import time

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

SAME_SIGNAL_SECONDS = 2.0
"""Seconds within which signals are one wish: a launcher passes on what slurm or a terminal has sent
to all processes."""


class _Heard:
    name = ""
    at = 0.0


def listen_for_signals() -> None:
    """From now on a signal is kept for `received_signal`; a later one ends the process at once.

    In the main thread.
    """
    _Heard.name = ""
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(ear,), name="signals", daemon=True).start()


def received_signal() -> str:
    """The name of the signal that came; empty where none did."""
    return _Heard.name


def _hear(ear: int) -> None:
    while number := os.read(ear, 1):
        if number[0] not in SIGNALS:
            continue
        now = time.monotonic()
        if not _Heard.name:
            _Heard.name, _Heard.at = signal.Signals(number[0]).name, now
        elif now - _Heard.at > SAME_SIGNAL_SECONDS:
            os._exit(1)
