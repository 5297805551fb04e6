"""Keeps passwords out of files that are shared: run directories get copied and uploaded.

A secret is known by the name it stands under, by its form, or because the environment holds it
under such a name. Rather a harmless word too many is masked than a key too few.
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
    r"|(?<![\w/])[\w.+-]+\\?:[^\s/:@]+(?=@[\w.-])"  # the same without https://; sweeps escape :
    rf"|(?<=[?&;])(?i:[\w-]*(?:{_NAME}|key|sig|signature))=[^&;#\s'\"]+"  # of a URL
    r"|(?<=(?i:bearer) )\S+"
)
"""As they are made: lengths and cases, so that HF_HUB_OFFLINE and sk-learning stay words."""

_ASSIGNED = re.compile(
    rf"((?:{_NAME}|passwords|secrets|credentials)=)(\"[^\"]*\"|'[^']*'|[^\s\"'&;,]+)", re.IGNORECASE
)
"""`export MY_PASSWORD=...` and its like within text."""

_OLD_WANDB = re.compile(r"(?<![0-9A-Za-z])(?<!snapshots/)[0-9a-f]{40}(?![0-9A-Za-z])")

# A commit has the form of an old W&B key, and is what makes a run reproducible.
_COMMITS = re.compile(r"(^|[._-])(revision|commit|identity)$", re.IGNORECASE)

_PLACES = ("PWD", "OLDPWD")
"""Of the shell; the folder may be gone."""

_SHORTEST = 8
"""Characters; a value of the environment that is shorter might be any word."""


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy of `value` (JSON's types) without secrets; `name` is the key it stands under."""
    if _NAMES.search(name) and value and not isinstance(value, bool):
        return MASK
    if isinstance(value, Mapping):
        return {k: mask_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mask_secrets(v, name) for v in value]
    return _masked_text(value, name) if isinstance(value, str) else value


def mask_command(words: list[str]) -> list[str]:
    """A command line without secrets: `x.token=...`, `--api-key ...`, and known forms."""
    shown, previous = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            shown.append(f"{mask_secrets(name)}={mask_secrets(value, name)}")
        else:
            shown.append(mask_secrets(word, previous if previous.startswith("-") else ""))
        previous = word
    return shown


def _masked_text(text: str, name: str) -> str:
    for secret in _of_the_environment():
        text = text.replace(secret, MASK)
    text = _ASSIGNED.sub(rf"\1{MASK}", _FORMS.sub(MASK, text))
    return text if _COMMITS.search(name) else _OLD_WANDB.sub(MASK, text)


def _of_the_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if _NAMES.search(name) and len(value) >= _SHORTEST and not _is_a_place(name, value):
            yield value


def _is_a_place(name: str, value: str) -> bool:
    """$PWD is no password, and the file that holds a secret is no secret: both name paths."""
    return name in _PLACES or (os.path.isabs(value) and os.path.exists(value))
