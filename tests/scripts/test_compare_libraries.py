"""scripts/compare_libraries.py quantizes with other libraries, and measures as hqqtrain does."""

import compare_libraries
import pytest
import torch
from compare_libraries import by_hqq, main, measure, parse_arguments
from runs import HELD_OUT, TEXT
from small_model import small_model
from transformers import AutoModelForCausalLM


def _words(*words: str) -> list[str]:
    return [str(small_model()), "--text", HELD_OUT, "--calibration", TEXT, "--tokens", "512",
            "--calibration-tokens", "1024", *words]  # fmt: skip


def test_more_bits_of_hqq_are_closer_to_full_precision():
    options = parse_arguments(_words())
    good, bad = (measure(by_hqq, options, nbits) for nbits in (8, 1))
    assert good[0] == pytest.approx(1, abs=2e-3)
    assert 0 < good[1] < bad[1] / 20
    assert good[2] > bad[2]


def test_hqq_changes_every_linear_but_the_head():
    options = parse_arguments(_words())
    before = AutoModelForCausalLM.from_pretrained(options.model)
    after = by_hqq(AutoModelForCausalLM.from_pretrained(options.model), None, 2, torch.empty(0))
    changed = {
        name for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }  # fmt: skip
    linears = {f"{name}.weight" for name, module in before.named_modules()
               if isinstance(module, torch.nn.Linear) and name != "lm_head"}  # fmt: skip
    assert changed == linears != set()


def test_all_libraries_see_the_same_sequences_within_the_wanted_tokens():
    from transformers import AutoTokenizer

    options = parse_arguments(_words())
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sequences = compare_libraries.calibration_sequences(options, tokenizer)
    assert sequences.shape == (2, 512)
    assert sequences.dtype == torch.int64


def test_a_library_that_is_not_installed_has_no_rows(monkeypatch, capsys):
    monkeypatch.setattr(compare_libraries, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["compare", *_words("--only", "AutoRound")])
    assert main() == 0
    assert "AutoRound is not installed" in capsys.readouterr().err
