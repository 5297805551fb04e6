"""The README's table of GPU memory is the one that the script computes."""

import re

import pytest
from memory_table import BEGIN, END, GPUS_GB, README, longest_sequences, model_configs, table_row


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|\n ").split("|")]


def _rows() -> list[list[str]]:
    text = README.read_text(encoding="utf-8")
    (table,) = re.findall(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    return [_cells(line) for line in table.splitlines()]


def test_the_header_says_that_the_figures_are_estimates():
    header = _rows()[0]
    assert header == ["estimated", "bits", *(f"{gpu} GB" for gpu in GPUS_GB)]


def test_a_row_of_the_readme_is_computed():
    name = "Llama 3.2 1B"
    assert table_row(name, model_configs()[name], 4) in _rows()


def test_every_model_has_a_row_for_every_number_of_bits():
    assert [row[:2] for row in _rows()[2:]] == [
        [name, str(nbits)] for name in model_configs() for nbits in (4, 2)
    ]


@pytest.mark.parametrize("nbits", [4])
def test_a_larger_gpu_never_fits_less(nbits):
    lengths = list(longest_sequences(model_configs()["Llama 3.2 1B"], nbits).values())
    known = [length or 0 for length in lengths]
    assert known == sorted(known)
