"""scripts/compare_quality.py runs the product for every row, and shows its figures."""

import subprocess

import compare_quality
import pytest
from compare_quality import figures, main, parse_arguments, run_words

from hqqtrain.compose.command import compose_command

SUMMARY = {
    "quantize": {"seconds": 2.0, "peak_memory_gib": 0.5},
    "eval": {
        "full_precision": {"perplexity": 8.0, "kl": 0.0},
        "quantized": {"perplexity": 10.0, "kl": 0.25, "top1_agreement": 0.75},
    },
}


def test_figures_are_relative_to_full_precision():
    assert figures(SUMMARY) == [1.25, 0.25, 0.75, 2.0, 0.5]


def test_an_infinite_perplexity_and_a_missing_agreement_are_none():
    evaluation = {"full_precision": {"perplexity": 8.0}, "quantized": {"perplexity": None}}
    assert figures(SUMMARY | {"eval": evaluation}) == [None, None, None, 2.0, 0.5]


def test_the_product_accepts_the_words_of_each_data_free_row(tmp_path):
    options = parse_arguments(["tiny_model", "train.precision=fp32", "--axis", "0"])
    assert len(options.rows) == 3
    for row in options.rows:
        words = run_words("tiny", row, 3, 0, options)
        quant = compose_command([*words, f"run.root={tmp_path}"], False).jobs[0].config.quant
        assert (f"solver={quant.solver}", quant.nbits, quant.axis) == (row, 3, 0)
        assert quant.calibration is None


def test_rows_without_calibration_are_data_free_whatever_the_default_is():
    options = parse_arguments(["m", "--calibration", "prose", "--text", "code"])
    words = [run_words("m", row, 4, 1, options) for row in options.rows]
    assert ["quant.calibration=null" in run for run in words] == [True] * 3 + [False] * 2
    assert ["quant.calibration=prose" in run for run in words] == [False] * 3 + [True] * 2


def test_named_rows_are_calibrated_where_their_solver_can_be():
    rows = ["solver=hqq", "solver=gptq zero=integer", "solver=least_squares calibration=null"]
    words = [word for row in rows for word in ("--row", row)]
    assert parse_arguments(["m", "--calibration", "auto", *words]).rows == [
        rows[0], f"{rows[1]} calibration=auto", rows[2],
    ]  # fmt: skip


def test_the_text_that_is_measured_is_not_calibrated_on(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["m", "--text", "code", "--calibration", "code"])
    assert "name another source" in capsys.readouterr().err


def test_one_table_with_failures_below_it(monkeypatch, capsys):
    def run_product(words, root):
        return "no such solver" if "quant.solver=bad" in words else SUMMARY

    monkeypatch.setattr(compare_quality, "run_product", run_product)
    words = "compare a/one b/two --nbits 4 2 --row solver=hqq --row solver=bad"
    monkeypatch.setattr("sys.argv", words.split())
    assert main() == 1
    header, line, *rows = capsys.readouterr().out.splitlines()
    assert header.split("|")[1].strip() == "model"
    assert set(line) == {"|", "-"}
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[:4]]
    assert [row[:4] for row in cells] == [
        [model, "hqq", nbits, "1"] for model in ("one", "two") for nbits in "42"
    ]
    assert all(row[4:] == ["1.25", "0.2500", "0.7500", "2.0", "0.50"] for row in cells)
    assert "Perplexity of one in full precision, on python_stdlib: 8" in rows
    assert "Failed: two, bad, 2 bits, axis 1: no such solver" in rows


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("1 s loading\nhqqtrain: error: no file\nKeys: a, b\n", "hqqtrain: error: no file"),
        ("Traceback:\n  ValueError\n", "ValueError"),
        ("", "exit code 3"),
    ],
)
def test_message_of_a_failed_run(tmp_path, monkeypatch, output, message):
    def run(command, **options):
        assert command[1:] == ["-m", "hqqtrain", "a=1", f"run.root={tmp_path}", "run.name=run"]
        return subprocess.CompletedProcess(command, 3, output)

    monkeypatch.setattr("subprocess.run", run)
    assert compare_quality.run_product(["a=1"], tmp_path) == message
