"""Find secrets in the shell commands of a configuration, such as those of `launch.setup`.

There a secret has no name of its own: it is the argument of an option, stands where a program
expects it, or comes from standard input. A reference, such as `--password "$PASSWORD"`, is no
secret. The tables of programs are in `hqqtrain/common/shell_programs.py`.
"""

import re
from collections.abc import Callable

from hqqtrain.common.shell_programs import ARGUMENTS, OPTIONS, PAIRS, READERS, SETTINGS

QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|`[^`]*`|\$\(.*\)|\$\{[^}]*\}|\\.)"""
"""Parts of a shell word that may contain spaces: quotes, substitutions and escapes.

`$(...)` may be nested, so it is taken to reach to the last closing parenthesis of the line.
"""

SECRET_WORD = r"""
    (?: token | jwt | passw(?:or)?d | pwd | passphrase | passcode | secret | credential
      | connection[-_]?string
      | (?:api|access|secret|private|account|shared)[-_]?key | (?<!public)[-_]key
      | (?<![^\W_])pass | (?<=[-_.])(?:pat|auth|dsn)
      | (?:ssh|db|pg|user|root|admin|smtp|mail|ftp|proxy|store|key)pass
    )"""
"""Regular expression, in verbose form, of the words that end the name of a secret."""

COMMAND_OUTPUT = r"""
    \$\( (?! \s*(?:echo|printf)\s+ (?:-\w+\s+|["']?%\w\S*\s+)* ["']?[^\s$"'()%-] ) [^()]*\)"""
"""A substitution of the output of a program, but not of `echo`, whose output is in the command."""

_REFERENCE = rf"""
    (?! (?: ''|""|true|false|null|stdin|(?:env|file|fd):[\w./$~{{}}-]+|id=\w[^\s;&|]* )
        (?:[\s;&|,'")\]]|$) )
    (?! (?P<q>"?)(?:[\w.@-]+[:%])?
        (?:\$\w+|\$\{{\w+\}}|{COMMAND_OUTPUT})
        (?P=q)(?=[\s;&|,'")\]]|$) )"""
"""Fails at a shell word that is empty, names the place of a secret, or is a variable or the output
of a program.

A user's name may stand before it, as in `user:$PASSWORD`.
"""

_WORD = rf"(?:{QUOTED}|[^\s;&|,'\"\])}}])+"
"""A shell word within the text of a list, such as `launch.setup=['a b', c]`."""

_ARGUMENT = rf"{_REFERENCE}(?![-<>#])(?P<secret>{_WORD})"
"""A word that is the secret, but no option, redirection or comment."""

_SPACE = r"[^\S\n]+"
"""Space within a line."""

_COMMAND_REST = rf"(?>{QUOTED}|[^;&|\n])*+"
"""The words after the name of a program, up to the end of its command.

It is possessive: a quote that could be read in two ways would need exponential time.
"""

_PIPELINE_REST = r"[^;&\n]{0,200}?"
"""Further words of a pipeline. Without a limit, long text would need quadratic time."""

_ECHO = rf"\b(?:echo|printf)\s+(?:-\w+\s+)*){_REFERENCE}(?P<secret>{_COMMAND_REST})"

_SECRET_FILE = rf"""
    >>?\s*["']?[^\s"'<>|;&]*
    (?: {SECRET_WORD} | credentials | \.netrc | \.pgpass | \.my\.cnf | \.htpasswd )
    (?![^\s"',;&|\])])"""
"""A redirection into a file that is named like a secret."""

_GAP = r"(?:\s|\\[nt])+"
"""Space in a .netrc file, which may be the argument of `printf`."""

_RULES = [
    # --password X, -token X
    rf"(?P<kept>(?<![\w-])--?[\w.-]{{0,80}}{SECRET_WORD}[\s]+){_REFERENCE}(?![-<>])"
    rf"(?P<secret>{_WORD})",
    # --password-command 'echo X', RESTIC_PASSWORD_COMMAND="printf X"
    rf"(?P<kept>{SECRET_WORD}[-_](?:command|cmd)(?:\s*=\s*|\s+)['\"]?(?:echo|printf)\s+)"
    rf"(?!\$\w)(?P<secret>{_WORD})",
    # Authorization: Basic X, PRIVATE-TOKEN: X; the header is quoted as a whole
    rf"(?P<kept>(?<![\w-])(?:(?:proxy-)?authorization|[\w-]{{1,80}}(?:-|(?=-key)){SECRET_WORD}"
    rf"|(?<=-H\ ['\"])(?:{SECRET_WORD}|auth|key))\s*:\s*"
    rf"(?:(?:basic|bearer|token|digest|\w*key|oauth)\s+)?){_REFERENCE}(?P<secret>[^\s'\"]+)",
    # Cookie: a=X; b=Y
    rf"(?P<kept>(?<![\w-])(?:set-)?cookie\s*:\s*){_REFERENCE}(?P<secret>[^'\"\n]+)",
    # "api_key": "X", \"api_key\": \"X\" and os.environ['A_TOKEN'] = 'X'
    rf"(?P<kept>(?P<n>\\*['\"])[\w.-]{{0,80}}{SECRET_WORD}(?P=n)\]?\s*[:=]\s*)(?P<secret>{_WORD})",
    # setenv A_TOKEN X, set -gx A_TOKEN X, aws configure set aws_secret_access_key X
    rf"(?P<kept>\b(?:setenv|set\s+-\w+|config(?:ure)?\s+set)\s+[\w.:/-]{{0,80}}{SECRET_WORD}\s+)"
    rf"{_REFERENCE}(?P<secret>{_WORD})",
    # login("X"), login(key="X")
    r"(?P<kept>\blogin\(\s*(?:\w+\s*=\s*)?)(?P<secret>\\*(?P<n>['\"])[^'\"]+(?P=n))",
    # openssl -passin pass:X, also in quotes
    rf"(?P<kept>(?<=['\"])pass:){_REFERENCE}(?P<secret>[^'\"\n]+)",
    rf"(?P<kept>\bpass:){_REFERENCE}(?P<secret>{_WORD})",
    # machine h login u password X
    rf"(?P<kept>\b(?:machine{_GAP}[^\s\\]+|default(?={_GAP}login))"
    rf"(?:{_GAP}(?:login|account){_GAP}[^\s\\]+)*{_GAP}password{_GAP})"
    rf"{_REFERENCE}(?P<secret>\"[^\"\n]+\"|(?:[^\s\"'\\]|\\(?![nt]).)+)",
    # echo X | docker login --password-stdin
    rf"(?P<kept>{_ECHO}(?=\|{_PIPELINE_REST}{READERS})",
    # echo X > ~/.cache/huggingface/token
    rf"(?P<kept>{_ECHO.replace('[^;&|', '[^;&|>')}(?={_SECRET_FILE})",
    # docker login --password-stdin <<< X, read A_TOKEN <<< X
    rf"(?P<kept>(?:{READERS}|\bread\s+(?:-\w+\s+)*\w*{SECRET_WORD}\b)"
    rf"(?>(?<=[\s=]){QUOTED}|[^;&|\n<'\"]){{0,200}}+<<<\s*){_REFERENCE}(?P<secret>{_WORD})",
    # cat <<< X | docker login --password-stdin
    rf"(?P<kept><<<\s*){_REFERENCE}(?P<secret>{_WORD})(?=\s*\|{_PIPELINE_REST}{READERS})",
    # docker login --password-stdin <<EOF
    rf"(?P<kept>{READERS}[^;&|\n<]{{0,200}}+<<-?\s*(?P<n>['\"]?)(?P<end>\w+)(?P=n)[^\n]*\n\s*)"
    rf"{_REFERENCE}(?P<secret>[\s\S]*?)(?=\n\s*(?P=end)\b)",
    *(
        rf"(?P<kept>(?<![\w.-]){words}{_SPACE}(?:-[\w-]+{_SPACE})*){_ARGUMENT}"
        for words in ARGUMENTS
    ),
]

_PATTERNS = [re.compile(rule, re.VERBOSE | re.IGNORECASE) for rule in _RULES]

_IN_COMMANDS = [
    *((program, rf"(?:{options})\s*=?\s*{_REFERENCE}") for program, options in OPTIONS.items()),
    *(
        (
            program,
            rf"(?:[\w.:/-]*[.:/_-])?(?i:{SECRET_WORD}|pass|auth|key|access_key_id)(?:\s+|=)"
            rf"{_REFERENCE}(?![-<>]|(?:basic|digest|custom|none)\b)",
        )
        for program in SETTINGS
    ),
    *(
        (program, rf"(?:--from-literal[\s=]\s*)?['\"]?(?!-)[\w./-]+=(?!@){_REFERENCE}")
        for program in PAIRS
    ),
]
"""(program, the words before a secret in its command)."""

_PROGRAMS = [
    (
        re.compile(rf"(?<![\w./-])(?:[\w./-]*/)?(?:{program})(?=\s){_COMMAND_REST}", re.DOTALL),
        re.compile(rf"(?P<kept>(?<=\s){before})(?P<secret>{_WORD})", re.VERBOSE),
    )
    for program, before in _IN_COMMANDS
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
