"""Mask secrets in files and messages, because run directories get copied and uploaded.

A value is a secret if its key is named like one, if it has the form of a known kind of token, or
if it is the value of an environment variable that is named like a secret. When in doubt, a
harmless word is masked rather than a key shown.
"""

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hqqtrain.common.shell_secrets import QUOTED, SECRET_WORD, mask_shell_secrets

MASK = "***"

_SECRET_NAME_END = re.compile(
    rf"(?:{SECRET_WORD}|passwords|secrets|credentials)(?:\[\w*\])?\+?$",
    re.IGNORECASE | re.VERBOSE,
)
"""Matches the end of a name whose value is a secret, such as `HF_TOKEN` or `track.api_key`.

A shell may append to a variable (`A_TOKEN+=x`) or set one of its elements (`A_TOKEN[0]=x`).
"""

_TOKENS = re.compile(
    rf"""
    (?<![0-9A-Za-z])                         # a token does not begin inside a word
    (?: hf_[0-9A-Za-z]{{30,}}                # Hugging Face
      | gh[opusr]_[0-9A-Za-z]{{36,}}         # GitHub
      | github_pat_\w{{36,}}                 # GitHub, fine-grained
      | wandb_v1_\w{{24,}}                   # W&B
      | sk-(?=[\w-]*\d)[\w-]{{20,}}          # OpenAI and others; with a digit, unlike sk-learning
      | glpat-[\w-]{{20,}}                   # GitLab
      | xox[a-z]-(?=[\w-]*\d)[\w-]{{10,}}    # Slack; with a digit
      | (?:AKIA|ASIA)[0-9A-Z]{{16}}(?!\w)    # AWS access key id
      | eyJ[\w-]{{8,}}\.[\w-]+\.[\w-]*       # JSON web token
      | AIza[\w-]{{35}} | ya29\.[\w-]{{20,}}   # Google
      | (?:npm_|nvapi-|r8_|dop_v1_|[sr]k_live_)[\w-]{{20,}}  # npm, NVIDIA, Replicate, others
      | pypi-[\w-]{{50,}}                     # PyPI
    )
    | (?<=://)[^/\s]+(?=@)                   # user:password@host, token@host
    | (?<![\w/])[\w.+-]{{1,256}}\\?:[^\s/:@]+(?=@[\w.-])  # user:password@host; `\:` in a sweep
    # A parameter of a URL, up to the fragment. After && or ; it may be a shell's assignment.
    | (?:(?<=\?)|(?<=[^&]&)) (?i:[\w-]*(?:{SECRET_WORD}|key|sig|signature))
      =(?:{QUOTED}|[^&;\#\s'"])+
    | (?<=[&;]) (?i:[\w-]*(?:{SECRET_WORD}|key|sig|signature))=(?:{QUOTED}|[^&;\s'"])+
    | (?<=(?i:bearer)\ )[^\s'"]+            # HTTP header
    | (?<=hooks\.slack\.com/services/)\S+   # Slack webhook
    | -----BEGIN[ A-Z]*PRIVATE\ KEY-----(?:.*?-----END[ A-Z]*PRIVATE\ KEY-----|.*)
    """,
    re.VERBOSE | re.DOTALL,
)
"""Known forms of secrets. The minimum lengths and the cases of letters keep ordinary words, such as
HF_HUB_OFFLINE, unmasked."""

_ASSIGNMENT = re.compile(
    rf"((?:{SECRET_WORD}|passwords|secrets|credentials)(?:\[\w*\])?\+?=)"
    rf"""(?:["'][^"']*\Z|(?:{QUOTED}|,(?!\w+=)|[^\s&;,])+)""",
    re.IGNORECASE | re.VERBOSE,
)
"""Matches a shell assignment within text, such as `export MY_PASSWORD="$X"pw`.

The match reaches to the end of the shell word, or of the text if a quote is not closed. A comma
ends the value only before the next assignment, as in `--export=A_TOKEN=x,B=y`.
"""

_OLD_WANDB_KEY = re.compile(r"(?<![0-9A-Za-z])(?<!snapshots/)[0-9a-f]{40}(?![0-9A-Za-z])")
"""A git commit has the same form, see `_COMMIT_NAME_END`; the hub's snapshots are commits."""

_COMMIT_NAME_END = re.compile(r"(^|[._-])(revision|commit|identity)$", re.IGNORECASE)
"""Matches the end of a name whose value is a hash that makes a run reproducible, so it is kept."""

_DIRECTORY_VARIABLES = ("PWD", "OLDPWD")
"""The shell's own variables that are named like a secret but name folders, which may be gone."""

_MIN_LENGTH = 8
"""Characters; a shorter value of an environment variable might be an ordinary word."""


def mask_secrets(value: Any, name: str = "") -> Any:
    """Return a copy of `value` with secrets replaced by `MASK`.

    Args:
        value: Any JSON value; a string may contain a secret anywhere.
        name: The key of `value`. If it is named like a secret, all of `value` is masked.
    """
    if _is_secret_name(name) and value and not isinstance(value, bool):
        return MASK
    if isinstance(value, Mapping):
        return {k: mask_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mask_secrets(v, name) for v in value]
    return _mask_text(value, name) if isinstance(value, str) else value


def mask_command(arguments: list[str]) -> list[str]:
    """Return a command line with secrets masked: `x.token=...`, `--api-key ...` and known forms."""
    masked, previous = [], ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_command = " " in name and not _is_secret_name(name)
        if equals and not is_command:
            masked.append(f"{mask_secrets(name)}={mask_secrets(value, name)}")
        else:  # the value of an option, as in `--api-key mine`, is an argument of its own
            masked.append(mask_secrets(argument, previous if previous.startswith("-") else ""))
        previous = argument
    return masked


def _mask_text(text: str, name: str) -> str:
    """Mask the secrets within `text`, which is the value of the key `name`."""
    for secret in environment_secrets().values():
        text = text.replace(secret, MASK)
    text = _ASSIGNMENT.sub(rf"\1{MASK}", _TOKENS.sub(MASK, text))
    text = mask_shell_secrets(text, MASK)
    return text if _COMMIT_NAME_END.search(name) else _OLD_WANDB_KEY.sub(MASK, text)


def environment_secrets() -> dict[str, str]:
    """Return the environment variables that are named like a secret, without short values."""
    named = {name: os.environ.get(name, "") for name in filter(_is_secret_name, os.environ)}
    return {
        name: value
        for name, value in named.items()
        if len(value) >= _MIN_LENGTH and not _is_path(name, value)
    }


@lru_cache(maxsize=4096)
def _is_secret_name(name: str) -> bool:
    """Whether a value of this name is a secret. The same names are asked for with every text."""
    return bool(_SECRET_NAME_END.search(name))


def _is_path(name: str, value: str) -> bool:
    """Whether the variable names a path, as $PWD and the name of a credentials file do."""
    return name in _DIRECTORY_VARIABLES or (os.path.isabs(value) and os.path.exists(value))
