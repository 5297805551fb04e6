"""Hints for arguments that are neither an option nor key=value."""

import pytest

from hqqtrain.cli import main


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        ("help", ["help: must be key=value. Did you mean '--help'?"]),
        ("check quant.nbits=2", ["check: must be key=value. Did you mean '--check'?"]),
        ("finetun", ["finetun: must be key=value. Did you mean 'task=finetune'?"]),
        ("tiny_2bits", ["tiny_2bits: must be key=value. Did you mean 'recipe=tiny_2bit'?"]),
        ("non\x1b[2Ksense", [r"non\x1b[2Ksense: must be key=value. See --help."]),
        ("nonsense", ["nonsense: must be key=value. See --help."]),
        ("quant.nbits 2", ["quant.nbits: must be key=value. Write quant.nbits=value", "2: m"]),
        ("--nbits=2", ["--nbits=2: unknown option. Did you mean 'quant.nbits'? Keys"]),
        ("--group-size=64", ["--group-size=64: unknown option. Did you mean 'quant.group_size'?"]),
        ("--quant.nbits=2", ["--quant.nbits=2: unknown option. Keys have no dashes: quant.nb"]),
        (
            "--logging_steps 10 --max-samples=9",
            ["--logging_steps: unknown option. Leave it out: every step is logged.",
             "--max-samples=9: unknown option. Leave it out: all rows are used; train.max_steps"],
        ),
        (
            "--learning-rate 1e-4 --epochs 3 --chek --nbits=2",
            ["--learning-rate: unknown option. Did you mean 'optim.lr'", "--epochs: unknown",
             "--chek: unknown option. Did you mean '--check'?", "--nbits=2: unknown option."],
        ),
    ],
)  # fmt: skip
def test_every_word_that_is_no_setting_gets_a_hint(capsys, words, hints):
    assert main(words.split()) == 2
    lines = capsys.readouterr().err.removeprefix("hqqtrain: error: ").splitlines()
    assert len(lines) == len(hints)
    for line, hint in zip(lines, hints, strict=True):
        assert line.startswith(hint)
