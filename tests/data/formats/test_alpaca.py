"""Instructions become the prompt of Stanford Alpaca."""

import pytest

from hqqtrain.data.examples import Completion
from hqqtrain.data.formats import alpaca
from hqqtrain.data.rows import RowError

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add {input} and {instruction}.

### Input:
2, {3}

### Response:
"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
Count.

### Response:
"""


def parse(**row: object) -> Completion:
    found = alpaca.match(row)
    assert found is not None
    example = found.parse(row)
    assert isinstance(example, Completion)
    return example


@pytest.mark.parametrize(("input", "output"), [("input", "output"), ("context", "response")])
def test_the_prompt(input, output):
    row = {"instruction": "Add {input} and {instruction}.", input: "2, {3}", output: "5"}
    assert parse(**row) == Completion(WITH_INPUT, "5")
    for empty in (None, "", " \n"):
        row = {"instruction": "Count.", input: empty, output: "1\n2"}
        assert parse(**row) == Completion(WITHOUT_INPUT, "1\n2")
    assert parse(**{"instruction": "Count.", output: "1"}) == Completion(WITHOUT_INPUT, "1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instruction": None}, "instruction is null, not text"),
        ({"instruction": " "}, "instruction is empty"), ({"output": None}, "output is null"),
        ({"input": 5}, "input is a number"), ({"output": ["a"]}, "output is a list"),
        ({"history": [["a", "b"]]}, "has a history, which the Alpaca prompt cannot show"),
        ({"system": "Be brief"}, "has a system"), ({"output": "\ud800"}, "output has '\\ud800'"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(change, reason):
    row = {"instruction": "a", "input": "", "output": "b", "history": [], "system": None}
    assert parse(**row).completion == "b"
    with pytest.raises(RowError) as caught:
        parse(**{**row, **change})
    assert reason in str(caught.value)


def test_the_columns():
    for columns in (["instruction"], ["instruction", "input"], ["input", "output"]):
        assert alpaca.match(columns) is None
