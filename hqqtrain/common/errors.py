"""Exit codes, and the exceptions that the command line shows as a message without a traceback."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.common.text import escape_terminal

DONE, FAILED, USER_ERROR, PREEMPTED = 0, 1, 2, 3
"""Exit codes of `python -m hqqtrain` and `./launch.sh`, on which schedulers and sweeps rely.

PREEMPTED means that the run was asked to stop and has saved its state, if there was any: run the
same command again to resume.
"""

INTERRUPTED = 130
"""Exit code of a process that a second Ctrl-C has ended, as shells have it (128 + SIGINT)."""


class UserError(ValueError):
    """An error in the user's configuration or data.

    The message names the key or file, its value, what is allowed, and the fix.
    Exit code USER_ERROR.

    Attributes:
        is_of_one_rank: Whether rank 0 may not have the error, so that this rank prints it.
    """

    is_of_one_rank = False


class DataError(UserError):
    """Data cannot be read while the model is trained. All ranks raise the error, before a step."""


class ErrorCollector:
    """Collects the `UserError`s of independent checks, so that the user sees all at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the `UserError` that the block raises, if any, and continue after the block."""
        try:
            yield
        except UserError as error:
            self.lines += str(error).splitlines()

    def raise_if_any(self) -> None:
        """Raise what was collected as one error.

        Raises:
            UserError: Something was collected. Several checks may find the same fault: it is one
                line.
        """
        if self.lines:
            raise UserError("\n".join(dict.fromkeys(self.lines)))


class RankLostError(RuntimeError):
    """Another rank failed or disappeared.

    The message says which rank and, if it is known, why. Exit code FAILED.
    """


class PreemptedError(RuntimeError):
    """The run was asked to stop, by a signal or by a time limit.

    The message says which. All ranks raise the error, or learn of it as a lost rank while the model
    is loaded. Exit code PREEMPTED.
    """


def error_line(message: object) -> str:
    """Return an error as the command line shows it, `hqqtrain: error: ...`.

    Secrets are masked, and control characters are escaped.
    """
    return f"hqqtrain: error: {escape_terminal(mask_secrets(str(message)))}"


def describe_error(error: BaseException) -> str:
    """Return the class and the first line of `error`, to quote another library in a message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `known`, or an empty string."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
