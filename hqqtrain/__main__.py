"""Entry point of `python -m hqqtrain`, which does the same as the console script `hqqtrain`."""

import contextlib
import logging
import os
import sys

from hqqtrain.cli import main


def run() -> None:
    """Run the command line and end the process with its exit code."""
    code = main()
    if "torch" in sys.modules:
        # All results are written and all ranks have met. The interpreter would now destroy objects
        # of native libraries, and one of them aborted rank 0 ("terminate called without an active
        # exception"), so that a run that was done ended with the exit code of a failure.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
