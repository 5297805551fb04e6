"""Kernels run for real where there is a GPU, and in Triton's interpreter where there is none."""

import os
import signal

import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its own functions are decorated when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["random_models", "quantized_models"]


def pytest_configure() -> None:
    """A script's background processes ignore these, and so would all that the tests start."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)
    ):  # fmt: skip
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
