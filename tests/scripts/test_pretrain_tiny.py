"""scripts/pretrain_tiny.py: sizes, the corpus that may be trained on, and the learning rate."""

import itertools
from collections import Counter
from importlib.metadata import Distribution

import numpy as np
import pretrain_corpus
import pytest
import torch
from pretrain_corpus import clean_corpus, encode, package_sources, permissive_license
from pretrain_corpus import train_tokenizer as tokenizer_of
from pretrain_tiny import SIZES, Size, batches, held_out_loss, learning_rate, save, train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PARAMETERS = {"tiny": 5_770_496, "16m": 16_783_872}
HELD_OUT = "\n".join(f"held_out({line})" for line in range(8))
SMALL = Size(280, 128, 128, 1, 2, context=16, batch=4, steps=30, lr=1e-2)


@pytest.mark.parametrize("size", SIZES)
def test_number_of_parameters(size):
    with torch.device("meta"):
        model = LlamaForCausalLM(SIZES[size].config())
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]


def test_the_larger_model_sees_300_m_tokens():
    size = SIZES["16m"]
    assert size.steps * size.batch * size.context >= 300e6


def installed(folder, metadata: str) -> Distribution:
    """Return a distribution with one file `module.py`."""
    info = folder / "package-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: package\n{metadata}\n")
    (info / "RECORD").write_text("module.py,,\nmissing.py,,\nnotes.txt,,\n")
    (folder / "module.py").write_text("x = 1\n" * 50)
    (folder / "notes.txt").write_text("x = 1\n" * 50)
    return Distribution.at(info)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("License-Expression: Apache-2.0", "Apache"),
        ("License-Expression: BSD-3-Clause AND MIT", "BSD"),
        ("License: MIT License", "MIT"),
        ("Classifier: License :: OSI Approved :: Python Software Foundation License", "Python S"),
        ("Classifier: Topic :: MIT", None),
        ("License: LGPL, or BSD", None),
        ("License: MIT\nClassifier: License :: OSI Approved :: GNU General Public License", None),
        ("License: Proprietary, do not submit", None),
        ("Summary: MIT", None),
    ],
)
def test_license(tmp_path, metadata, expected):
    name = permissive_license(installed(tmp_path, metadata))
    assert name is None if expected is None else name is not None and name.startswith(expected)


def test_python_files_of_permissive_packages_only(tmp_path, monkeypatch):
    (tmp_path / "free").mkdir()
    (tmp_path / "closed").mkdir()
    packages = [
        installed(tmp_path / "closed", "License: Proprietary"),
        installed(tmp_path / "free", "License: MIT"),
    ]
    monkeypatch.setattr(pretrain_corpus, "distributions", lambda: packages)
    licenses: Counter[str] = Counter()
    assert list(package_sources(1000, licenses)) == [("module", "x = 1\n" * 50)]
    assert list(package_sources(100, licenses)) == [], "the file is too long"
    assert licenses == {"MIT": 1}


def test_no_copy_of_a_held_out_module(monkeypatch):
    monkeypatch.setattr(pretrain_corpus, "stdlib_texts", lambda split: [("heldout", HELD_OUT)])
    copied = "import os\n\n" + HELD_OUT.replace("\n", "\n\n   ")
    short = "\n".join(HELD_OUT.splitlines()[:4]) + "\nend()"
    sources = [("a", copied), ("b", short), ("c", short), ("d", "x = 1\n" * 9)]
    assert clean_corpus(sources) == [short, "x = 1\n" * 9]


def test_learning_rate():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[20] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))


def test_a_small_model_learns_its_text_and_is_saved(tmp_path, monkeypatch, capsys):
    text = "def f(x):\n    return x\n" * 50
    monkeypatch.setattr("pretrain_tiny.stdlib_texts", lambda split: [("module", text)])
    torch.manual_seed(0)
    tokenizer = tokenizer_of([text], SMALL.vocabulary)
    stream = encode(tokenizer, [text])
    assert stream[-1] == 0
    assert tokenizer.decode(stream[:-1]) == text
    batch = next(batches(stream, SMALL, torch.device("cpu")))
    assert batch.shape == (4, 17)
    assert batch.dtype == torch.int64
    model = LlamaForCausalLM(SMALL.config())
    before = held_out_loss(model, tokenizer, SMALL.context)
    assert train(model, stream, SMALL, minutes=0) == 30 * 4 * 16
    after = held_out_loss(model, tokenizer, SMALL.context)
    assert after < before / 2
    save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert held_out_loss(loaded, tokenizer, SMALL.context) == pytest.approx(after, rel=0.05)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == stream[:-1].tolist()


def test_the_time_limit_ends_training(capsys):
    stream = np.arange(200, dtype=np.uint16)
    model = LlamaForCausalLM(SMALL.config())
    assert train(model, stream, SMALL, minutes=1e-9) == 4 * 16
