"""Record signals from the start of the process. The ranks act on them together later.

SIGUSR1 and SIGTERM come from a scheduler, SIGINT from Ctrl-C, SIGHUP from a terminal that closes.
Importing torch takes seconds, during which an unhandled signal would end the process silently. A
thread reads the signals, because Python runs signal handlers only in the main thread, and the main
thread may be blocked in a collective that never ends.
"""

import os
import signal
import threading
import time
from contextlib import suppress

from hqqtrain.common.env import get_rank, get_world_size
from hqqtrain.common.errors import FAILED, INTERRUPTED

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

SAME_SIGNAL_SECONDS = 2.0
"""Seconds within which several signals count as one request.

A launcher forwards a signal that Slurm or the terminal has also sent to every process.
"""

CTRL_C_SECONDS = 0.3
"""The same for Ctrl-C without a launcher: a user who presses it twice wants the process to end."""


class _FirstSignal:
    name = ""
    time = 0.0


def listen_for_signals() -> None:
    """Record the first signal for `received_signal`. A later one ends the process at once.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored, unless a launcher has started
    this process: launchers pass on signals that they were told to ignore. The caller must be the
    main thread.
    """
    _FirstSignal.name = ""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN and get_world_size() == 1:
            continue
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
        is_ctrl_c = number[0] == signal.SIGINT and get_world_size() == 1
        if not _FirstSignal.name:
            _FirstSignal.name, _FirstSignal.time = signal.Signals(number[0]).name, now
            if get_rank() == 0:
                _acknowledge(number[0])
        elif now - _FirstSignal.time > (CTRL_C_SECONDS if is_ctrl_c else SAME_SIGNAL_SECONDS):
            os._exit(INTERRUPTED if number[0] == signal.SIGINT else FAILED)


def _acknowledge(number: int) -> None:
    """Say that the run stops soon. The main thread may be busy, so its streams are not used."""
    again = "; press Ctrl-C again to end at once" if number == signal.SIGINT else ""
    text = (
        f"\nhqqtrain: {signal.Signals(number).name} was received: stopping after this step"
        f"{again}.\n"
    )
    with suppress(OSError):
        os.write(2, text.encode())
