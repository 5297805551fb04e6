"""Record SIGUSR1 and SIGTERM from the start of the process. The ranks act on them together later.

Importing torch takes seconds, during which an unhandled signal would end the process silently. A
thread reads the signals, because Python runs signal handlers only in the main thread, and the main
thread may be blocked in a collective that never ends.
"""

import os
import signal
import threading
import time

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

SAME_SIGNAL_SECONDS = 2.0
"""Seconds within which several signals count as one request.

A launcher forwards a signal that Slurm or the terminal has also sent to every process.
"""


class _FirstSignal:
    name = ""
    time = 0.0


def listen_for_signals() -> None:
    """Record the first signal for `received_signal`. A later one ends the process at once.

    The caller must be the main thread.
    """
    _FirstSignal.name = ""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in SIGNALS:
        # Python writes to the wakeup descriptor only for signals that have a Python handler.
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read_end,), name="signals", daemon=True).start()


def received_signal() -> str:
    """Return the name of the first signal, or an empty string if none has arrived."""
    return _FirstSignal.name


def _watch(read_end: int) -> None:
    while number := os.read(read_end, 1):
        if number[0] not in SIGNALS:
            continue
        now = time.monotonic()
        if not _FirstSignal.name:
            _FirstSignal.name, _FirstSignal.time = signal.Signals(number[0]).name, now
        elif now - _FirstSignal.time > SAME_SIGNAL_SECONDS:
            os._exit(1)
