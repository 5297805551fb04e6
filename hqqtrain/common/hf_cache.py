"""Recognize errors of the folder in which the Hugging Face libraries keep their downloads.

Such an error is not about the model or the data set that was asked for, so the message must name
the environment variable that says where the folder is.
"""

import os

from hqqtrain.common.errors import UserError

_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")


def hf_home() -> str:
    """Return the folder of the caches, as `huggingface_hub` finds it."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"))


def hf_cache_error(error: BaseException) -> UserError | None:
    """Return the error for a cache that cannot be used; None if `error` has another cause.

    Only the operating system gives an error both a number and a file; network errors have none.
    """
    cause: BaseException | None = error
    while cause and not (isinstance(cause, OSError) and cause.errno and cause.filename):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    assert isinstance(cause, OSError)
    set_variables = ", ".join(name for name in _VARIABLES if os.environ.get(name))
    return UserError(
        f"HF_HOME={hf_home()}: the cache of Hugging Face cannot be used: {cause.strerror}: "
        f"{cause.filename}. Set the environment variable HF_HOME to a folder that you can write "
        f"to, with free space (set here: {set_variables or 'none of its variables'})."
    )
