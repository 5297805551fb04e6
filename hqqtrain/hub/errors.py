"""Turn failures of the Hub into messages that the user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from hqqtrain.common.errors import PreemptedError, RankLostError, UserError, describe_error

_LOG_IN = "log in with `hf auth login`, or set the environment variable HF_TOKEN"

OFFLINE_ERROR = (
    "needs the Hub, but HF_HUB_OFFLINE=1 is set; unset it, or push the finished run from a machine "
    "with a network, by the same command."
)
NO_TOKEN_ERROR = f"needs a token with write access: {_LOG_IN}."

_UNREADABLE = (LookupError, TypeError, AttributeError)
"""Errors that huggingface_hub raises for an answer that lacks parts which it reads."""


@contextmanager
def hub_errors(where: str, advice: str = "") -> Iterator[None]:
    """Raise a UserError in place of an error of huggingface_hub.

    Args:
        where: The beginning of the message, such as the key with its value.
        advice: The last sentence of the message.
    """
    try:
        yield
    except (UserError, PreemptedError, RankLostError):
        raise
    # huggingface_hub wraps the error of an upload in a RuntimeError, and hf_xet raises that, too.
    except (HTTPError, HFValidationError, OSError, RuntimeError, ValueError, *_UNREADABLE) as error:
        reason = _reason(_cause(error))
        raise UserError(f"{where}: {reason}{' ' if advice else ''}{advice}") from error


def _cause(error: BaseException) -> BaseException:
    """Return the answer of the Hub, or the failure of the network, that caused an error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__
    return cause or error


def _reason(error: BaseException) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the Hub does not accept the token; {_LOG_IN}, with one that has write access."
    if status == 403:
        return (
            "the token may not write there; use one with write access to it, or a name of your own."
        )
    if status == 412:
        return "somebody else has pushed to it at the same time."
    if status is not None:
        return f"the Hub has refused the request ({describe_error(error)})."
    if isinstance(error, _UNREADABLE):
        return f"the answer of the Hub cannot be read ({describe_error(error)})."
    if isinstance(error, HTTPError):
        return f"the connection to the Hub has failed ({describe_error(error)})."
    return f"the push has failed ({describe_error(error)})."
