"""Mask secrets in files and messages, because run directories get copied and uploaded.

A value is a secret if its key is named like one, if it has the form of a known kind of token, or
if it is the value of an environment variable that is named like a secret. When in doubt, a
harmless word is masked rather than a key shown.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"

_NAME = (
    r"(?:token|passw(?:or)?d|pwd|passphrase|secret|credential"
    r"|(?:api|access|secret|private)[-_]?key)"
)
_NAMES = re.compile(rf"(?:{_NAME}|passwords|secrets|credentials)$", re.IGNORECASE)
_FORMS = re.compile(
    r"(?<![0-9A-Za-z])(?:hf_[0-9A-Za-z]{30,}|gh[opusr]_[0-9A-Za-z]{36,}|github_pat_\w{36,}"
    r"|wandb_v1_\w{24,}|sk-(?=[\w-]*\d)[\w-]{20,}|glpat-[\w-]{20,}|xox[a-z]-(?=[\w-]*\d)[\w-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?!\w)|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)"  # AWS; JSON web tokens
    r"|(?<=://)[^/\s]+(?=@)"  # user:password@host, token@host
    r"|(?<![\w/])[\w.+-]+\\?:[^\s/:@]+(?=@[\w.-])"  # the same without a scheme; sweeps escape :
    rf"|(?<=[?&;])(?i:[\w-]*(?:{_NAME}|key|sig|signature))=[^&;#\s'\"]+"  # URL parameters
    r"|(?<=(?i:bearer) )\S+"
)
"""Known forms of tokens. Exact lengths and cases keep HF_HUB_OFFLINE and sk-learning unmasked."""
_ASSIGNED = re.compile(
    rf"((?:{_NAME}|passwords|secrets|credentials)=)(\"[^\"]*\"|'[^']*'|[^\s\"'&;,]+)", re.IGNORECASE
)
"""Assignments within text, such as `export MY_PASSWORD=...`."""
_OLD_WANDB = re.compile(r"(?<![0-9A-Za-z])(?<!snapshots/)[0-9a-f]{40}(?![0-9A-Za-z])")
# A git commit has the form of an old W&B key but must be kept: it makes a run reproducible.
_COMMITS = re.compile(r"(^|[._-])(revision|commit|identity)$", re.IGNORECASE)
_DIRECTORY_VARIABLES = ("PWD", "OLDPWD")
"""The shell's own variables that match `_NAMES` but name folders, which may no longer exist."""
_MIN_LENGTH = 8
"""Characters; a shorter value of an environment variable might be an ordinary word."""


def masked(value: Any, name: str = "") -> Any:
    """Return a copy of `value` with secrets replaced by `MASK`.

    Args:
        value: Any JSON value; a string may contain a secret anywhere.
        name: The key of `value`. If it is named like a secret, all of `value` is masked.
    """
    if _NAMES.search(name) and value and not isinstance(value, bool):
        return MASK
    if isinstance(value, Mapping):
        return {k: masked(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [masked(v, name) for v in value]
    return _masked_text(value, name) if isinstance(value, str) else value


def masked_command(words: list[str]) -> list[str]:
    """Return a command line with secrets masked: `x.token=...`, `--api-key ...` and known forms."""
    shown, previous = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            shown.append(f"{masked(name)}={masked(value, name)}")
        else:
            shown.append(masked(word, previous if previous.startswith("-") else ""))
        previous = word
    return shown


def _masked_text(text: str, name: str) -> str:
    for secret in _environment_secrets():
        text = text.replace(secret, MASK)
    text = _ASSIGNED.sub(rf"\1{MASK}", _FORMS.sub(MASK, text))
    return text if _COMMITS.search(name) else _OLD_WANDB.sub(MASK, text)


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if _NAMES.search(name) and len(value) >= _MIN_LENGTH and not _is_path(name, value):
            yield value


def _is_path(name: str, value: str) -> bool:
    """Whether the variable names a path, as $PWD and the name of a credentials file do."""
    return name in _DIRECTORY_VARIABLES or (os.path.isabs(value) and os.path.exists(value))
