"""Make conversations about Python's standard library: chat data that every user has.

With them, a chat is fine-tuned without network access. Questions follow a few templates, and the
answers are docstrings and signatures of the interpreter that runs the program. Modules are read,
never imported. They are held out by their names, as in `stdlib.py`.
"""

import ast
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hqqtrain.data.examples import Conversation, Message
from hqqtrain.data.stdlib import stdlib_texts

SYSTEM = "You answer questions about Python's standard library in one or two sentences."
"""The system message of every other conversation."""

MAX_SUBJECTS = 6
"""Most functions and classes of a module that conversations are about."""

_MAX_SOURCE = 40_000
"""Most characters of a module that is parsed. Longer ones would take most of the time."""

_MAX_CHARACTERS = 240
"""Longest answer. Longer docstrings are left out, because a cut one would be no answer."""


@dataclass(frozen=True)
class _Subject:
    """A public function or class with a docstring: its full name, its parameters and its text."""

    name: str
    parameters: str | None
    text: str


def stdlib_conversations(split: str) -> Iterator[Conversation]:
    """Yield conversations about the modules of `split`, `train` or `held_out`, by module name.

    Each conversation has one to three questions about neighboring subjects of a module.
    """
    for module, source in stdlib_texts(split):
        is_private = any(part.startswith("_") for part in module.split("."))
        if is_private or len(source) > _MAX_SOURCE:
            continue
        subjects = _subjects(module, source)
        while subjects:
            size = 1 + _draw(f"{module} {len(subjects)}", 3)
            yield _conversation(subjects[:size])
            subjects = subjects[size:]


def _subjects(module: str, source: str) -> Sequence[_Subject]:
    """Return up to `MAX_SUBJECTS` subjects of a module, in the order of its source."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):  # it is for another version of Python
        return ()
    subjects = []
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        text = _first_paragraph(ast.get_docstring(node) or "")
        if text:
            parameters = ast.unparse(node.args) if isinstance(node, ast.FunctionDef) else None
            subjects.append(_Subject(f"{module}.{node.name}", parameters, text))
    return subjects[:MAX_SUBJECTS]


def _first_paragraph(docstring: str) -> str:
    """Return the first paragraph as one line; empty if it is no sentence or a long text."""
    text = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    is_sentence = text[:1].isupper() and text.endswith(".") and " " in text
    return text if is_sentence and len(text) <= _MAX_CHARACTERS else ""


def _conversation(subjects: Sequence[_Subject]) -> Conversation:
    messages: list[Message] = []
    if _draw(f"system {subjects[0].name}", 2):
        messages.append({"role": "system", "content": SYSTEM})
    for subject in subjects:
        question, answer = _question_and_answer(subject)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return Conversation(tuple(messages))


def _question_and_answer(subject: _Subject) -> tuple[str, str]:
    module, _, name = subject.name.rpartition(".")
    pairs = [
        (f"What does {subject.name} do?", subject.text),
        (f"I use the module {module}. Tell me what {name} is for.", subject.text),
        (f'In which module do I find this? "{subject.text}"', f"It is {name} in {module}."),
    ]
    if subject.parameters is not None:
        call = f"import {module}\n{subject.name}({subject.parameters})"
        pairs.append((f"How is {subject.name} called?", f"{subject.text}\n\n{call}"))
    return pairs[_draw(subject.name, len(pairs))]


def _draw(key: str, number: int) -> int:
    """Return one of the first `number` integers, by a hash of `key`: the same everywhere."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % number
