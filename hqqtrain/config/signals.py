"""SIGUSR1 and SIGTERM: heard from the first moment, acted upon where all ranks meet.

Importing torch takes seconds, in which a signal would else end the process without a word.
"""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_received: list[str] = []


def listen() -> None:
    """From now on a signal is kept for `received`; a second one ends the process, at once."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def received() -> str:
    """The name of the signal that came; empty where none did."""
    return _received[0] if _received else ""


def _on_signal(number: int, _: FrameType | None) -> None:
    if _received:
        os._exit(1)
    _received.append(signal.Signals(number).name)
