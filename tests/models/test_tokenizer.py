"""The tokenizer is that of transformers; every folder without one gives a message."""

import pytest
from transformers import AutoTokenizer

from hqqtrain.common.errors import UserError
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer


def test_the_tokenizer_of_a_folder():
    text = "def f(x):\n    return x + 1\n"
    ids = load_tokenizer(TINY_FOLDER)(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(TINY_FOLDER)(text)["input_ids"]
    assert load_tokenizer(TINY_FOLDER).decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": "{"},
        {"tokenizer_config.json": '{"tokenizer_class": "NoSuchTokenizer"}'},
        {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["a.B", null]}}'},
    ],
)
def test_a_folder_without_a_usable_tokenizer(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="its tokenizer cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "copy those of the model" in str(error.value)
    assert "\n" not in str(error.value)
