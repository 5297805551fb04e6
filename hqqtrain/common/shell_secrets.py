"""Find secrets in the shell commands of a configuration, such as those of `launch.setup`.

There a secret has no name of its own: it is the argument of an option, or stands where a program
expects it. A reference, such as `--password "$PASSWORD"`, is no secret.
"""

import re
from collections.abc import Callable

QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|`[^`]*`|\$\(.*\)|\$\{[^}]*\}|\\.)"""
"""Parts of a shell word that may contain spaces: quotes, substitutions and escapes.

`$(...)` may be nested, so it is taken to reach to the last closing parenthesis of the line.
"""

SECRET_WORD = r"""
    (?: token | passw(?:or)?d | pwd | passphrase | passcode | secret | credential
      | connection[-_]?string
      | (?:api|access|secret|private|account|shared)[-_]?key | (?<!public)[-_]key
      | (?<![^\W_])pass | (?<=[-_.])(?:pat|auth|dsn)
      | (?:ssh|db|pg|user|root|admin|smtp|mail|ftp|proxy)pass
    )"""
"""Regular expression, in verbose form, of the words that end the name of a secret."""

_REFERENCE = r"""
    (?! (?P<q>"?)(?:[\w.@-]+[:%])?
        \$(?:\w+|\{\w+\}|\([^()]*\))
        (?P=q)(?=[\s;&|,'")\]]|$) )"""
"""Fails at a shell word that is a variable or the output of a program, perhaps after `user:`."""

_WORD = rf"(?:{QUOTED}|[^\s;&|,'\"\])}}])+"
"""A shell word within the text of a list, such as `launch.setup=['a b', c]`."""

_COMMAND_REST = rf"(?>{QUOTED}|[^;&|\n])*+"
"""The words after the name of a program, up to the end of its command.

It is possessive: a quote that could be read in two ways would need exponential time.
"""

_OPTIONS = {
    r"curl": r"-[A-Za-z]*[uU]|--user|--proxy-user|--pass",
    r"xh|https?": r"-a|--auth",
    r"wget": r"--user|--header-token",
    r"[\w.-]+\s+(?:registry\s+)?login": r"-p",
    r"sshpass": r"-p",
    r"mysql\w*|mariadb[\w-]*": r"-p(?=\S)",
    r"redis-cli": r"-a|--pass",
    r"ldap\w+": r"-w",
    r"smbclient|rpcclient": r"-U",
    r"unzip|zip|7z": r"-P|-p(?=\S)",
}
"""Programs and those of their options, besides the ones named like a secret, that take one."""

_RULES = [
    # --password X, -token X
    rf"(?P<kept>(?<![\w-])--?[\w.-]{{0,80}}{SECRET_WORD}[\s]+){_REFERENCE}(?!-)(?P<secret>{_WORD})",
    # Authorization: Basic X, PRIVATE-TOKEN: X; the header is quoted as a whole
    rf"(?P<kept>(?<![\w-])(?:(?:proxy-)?authorization|[\w-]{{1,80}}-{SECRET_WORD})\s*:\s*(?:(?:basic|bearer|token"
    rf"|digest|apikey)\s+)?){_REFERENCE}(?P<secret>[^\s'\"]+)",
    # "api_key": "X" and os.environ['A_TOKEN'] = 'X'
    rf"(?P<kept>(?P<n>['\"])[\w.-]{{0,80}}{SECRET_WORD}(?P=n)\]?\s*[:=]\s*)(?P<secret>{_WORD})",
    # setenv A_TOKEN X, set -gx A_TOKEN X, aws configure set aws_secret_access_key X
    rf"(?P<kept>\b(?:setenv|set\s+-\w+|config(?:ure)?\s+set)\s+[\w.:/-]{{0,80}}{SECRET_WORD}\s+)"
    rf"{_REFERENCE}(?P<secret>{_WORD})",
    # wandb login X
    rf"(?P<kept>\bwandb\s+login\s+(?:-\S+\s+)*){_REFERENCE}(?!-)(?P<secret>{_WORD})",
    # openssl -passin pass:X
    rf"(?P<kept>\bpass:){_REFERENCE}(?P<secret>{_WORD})",
    # echo X | docker login --password-stdin
    rf"(?P<kept>\b(?:echo|printf)\s+(?:-\w+\s+)*){_REFERENCE}(?P<secret>{_COMMAND_REST})"
    r"(?=\|[^;&|\n]*(?:stdin|login|passwd|passphrase|kinit|sudo\s+-S))",
]

_PATTERNS = [re.compile(rule, re.VERBOSE | re.IGNORECASE) for rule in _RULES]

_PROGRAMS = [
    (
        re.compile(rf"(?<![\w./-])(?:[\w./-]*/)?(?:{program})(?=\s){_COMMAND_REST}", re.DOTALL),
        re.compile(
            rf"(?P<kept>(?<=\s)(?:{options})\s*=?\s*){_REFERENCE}(?P<secret>{_WORD})", re.VERBOSE
        ),
    )
    for program, options in _OPTIONS.items()
]


def mask_shell_secrets(text: str, mask: str) -> str:
    """Replace the secrets in shell commands within `text` by `mask`."""

    def replace(match: re.Match[str]) -> str:
        space = " " if match["secret"].endswith(" ") else ""
        return match["kept"] + mask + space

    for program, option in _PROGRAMS:
        text = program.sub(_replace_in_match(option, replace), text)
    for pattern in _PATTERNS:
        text = pattern.sub(replace, text)
    return text


def _replace_in_match(
    option: re.Pattern[str], replace: Callable[[re.Match[str]], str]
) -> Callable[[re.Match[str]], str]:
    return lambda command: option.sub(replace, command[0])
