"""The README's table of GPU memory is the one that the scripts compute or have measured."""

import re

import measure_memory
import pytest
import torch
from measure_memory import Measurement, TrainingStep, measure, try_lengths
from memory_table import (
    BEGIN,
    END,
    GPUS_GB,
    ORIGIN,
    README,
    estimated_lengths,
    memory_run,
    model_configs,
    table_row,
)
from transformers import LlamaConfig

from hqqtrain.config.run import RunConfig


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|\n ").split("|")]


def _rows() -> list[list[str]]:
    text = README.read_text(encoding="utf-8")
    (table,) = re.findall(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    return [_cells(line) for line in table.splitlines() if line.startswith("|")]


def test_the_header_says_where_the_figures_come_from():
    assert _rows()[0] == ["predicted", "bits", *(f"{gpu} GB" for gpu in GPUS_GB)]
    assert ORIGIN in README.read_text(encoding="utf-8")


def test_a_row_of_the_readme_is_that_of_the_script():
    name = "Llama 3.2 1B"
    assert table_row(name, 4, estimated_lengths(model_configs()[name], 4)) in _rows()


def test_every_model_has_a_row_for_every_number_of_bits():
    assert [row[:2] for row in _rows()[2:]] == [
        [name, str(nbits)] for name in model_configs() for nbits in (4, 2)
    ]


def test_a_larger_gpu_never_fits_less():
    lengths = list(estimated_lengths(model_configs()["Llama 3.2 1B"], 4).values())
    known = [length or 0 for length in lengths]
    assert known == sorted(known)


def test_each_gpu_starts_with_the_length_that_did_not_fit_on_the_smaller_one():
    tried = []

    def attempt(gpu, tokens):
        tried.append((gpu, tokens))
        return tokens <= {8: 0, 12: 1024, 16: 1024, 24: 4096}[gpu]

    longest = try_lengths(attempt, (8, 12, 16, 24), (512, 1024, 2048, 4096))
    assert longest == {8: None, 12: 1024, 16: 1024, 24: 4096}
    assert tried == [(8, 512), (12, 512), (12, 1024), (12, 2048), (16, 2048), (24, 2048), (24, 4096)]  # fmt: skip  # noqa: E501


@pytest.fixture(scope="module")
def attempts() -> list[Measurement]:
    """Attempts with a small model, of which more than 24 tokens run out of memory on 8 GB."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    limit = None

    def fp32_run(nbits: int) -> RunConfig:  # accelerate allows one precision for each process
        run = memory_run(nbits)
        run.train.precision = "fp32"
        return run

    class LimitedStep(TrainingStep):
        def __call__(self, tokens: int) -> None:
            super().__call__(tokens)
            if limit is not None and limit < 12 * 10**9 and tokens > 24:
                raise torch.OutOfMemoryError

    def limit_memory(_, size):
        nonlocal limit
        limit = size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_memory, "TrainingStep", LimitedStep)
        patch.setattr(measure_memory, "memory_run", fp32_run)
        patch.setattr(measure_memory, "limit_memory", limit_memory)
        rows: list[Measurement] = []
        measure("small", config, 2, (8, 12), (16, 24, 48), rows.append)
        return rows


def test_a_model_is_loaded_and_trained_until_it_is_out_of_memory(attempts):
    assert [(row.gpu_gb, row.tokens, row.fits) for row in attempts] == [
        (8, 0, "fits"), (12, 0, "fits"), (8, 16, "fits"), (8, 24, "fits"),
        (8, 48, "out of memory"), (12, 48, "fits"),
    ]  # fmt: skip
    assert all(row.peak_gib > 0 for row in attempts)
