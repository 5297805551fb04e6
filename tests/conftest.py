"""Settings of all tests: Triton kernels run in the interpreter on a machine without a GPU."""

import os
import signal

import torch

if not torch.cuda.is_available():
    # Triton reads this when its functions are decorated, so it is set before the first import.
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["random_models", "quantized_models", "tiny_runs"]


def pytest_configure() -> None:
    """Restore signals that a shell makes background processes ignore.

    Child processes inherit ignored signals, so the tests that send signals would hang.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, default in defaults.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)
