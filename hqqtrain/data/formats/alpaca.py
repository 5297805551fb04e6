"""Alpaca: an instruction, an optional input and an output, in the prompt of Stanford Alpaca.

The prompt is the one that models trained on such data know; a base model needs no chat template.
"""

from collections.abc import Collection

from hqqtrain.data.examples import Completion
from hqqtrain.data.formats.format import Format, check_text, first_of
from hqqtrain.data.rows import Row, RowError

NAME, NEEDS = "alpaca", "instruction, output and maybe input"

INSTRUCTION = "instruction"
INPUT_COLUMNS, OUTPUT_COLUMNS = ("input", "context"), ("output", "response")
"""The names of Alpaca and those of Dolly."""

PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)

_OTHER_TURNS = ("history", "system")
"""Columns that some tools add, for which the prompt has no place."""


def match(columns: Collection[str]) -> Format | None:
    """Return the format of rows with these columns; None if they are no instructions."""
    output = first_of(OUTPUT_COLUMNS, columns)
    if INSTRUCTION not in columns or output is None:
        return None
    input = first_of(INPUT_COLUMNS, columns)
    others = tuple(name for name in _OTHER_TURNS if name in columns)
    read = (INSTRUCTION, *([input] if input else []), output, *others)
    return Format(NAME, read, lambda row: parse(row, input, output))


def parse(row: Row, input: str | None, output: str) -> Completion:
    """Return the prompt and the completion of a row.

    Args:
        row: The row.
        input: The column of the input, if there is one.
        output: The column of the output.

    Raises:
        RowError: The row has no instruction or no output, or turns before it.
    """
    for name in _OTHER_TURNS:
        if row.get(name):
            raise RowError(f"has a {name}, which the Alpaca prompt cannot show; use messages")
    instruction = check_text(row.get(INSTRUCTION), INSTRUCTION)
    if not instruction.strip():
        raise RowError(f"{INSTRUCTION} is empty")
    given = row.get(input) if input else None
    context = "" if given is None else check_text(given, str(input))
    # Not `format`: the text may have braces.
    prompt = (PROMPT_WITH_INPUT if context.strip() else PROMPT).split("{instruction}")
    rest = prompt[1].split("{input}")
    text = prompt[0] + instruction + context.join(rest)
    return Completion(text, check_text(row.get(output), output))
