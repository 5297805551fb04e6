"""The name of an entry has everything that decides its tokens, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks import token_identity as module
from hqqtrain.tasks.token_identity import token_identity


@pytest.fixture
def identity(make_config):
    """Return a function that returns the identity of a configuration as text."""
    tiny = load_tokenizer(TINY_FOLDER)

    def find(folder: Path = TINY_FOLDER, settings: dict[str, Any] | None = None, **groups) -> str:
        tokenizer = tiny if folder == TINY_FOLDER else load_tokenizer(folder)
        found = token_identity(make_config(**groups), tokenizer, folder, **(settings or {}))
        return json.dumps(found, sort_keys=True)

    return find


def test_keys_that_change_no_token(identity):
    same = identity()
    for data in ({"show": 0}, {"workers": 7}, {"cache_dir": "x"}, {"shuffle_buffer": 5}):
        assert identity(data=data) == same
    assert identity(quant={"nbits": 2}, train={"max_steps": 9}, run={"name": "other"}) == same


def test_keys_and_contents_that_change_tokens(identity, tmp_path: Path, monkeypatch):
    found = [identity()]
    template = tmp_path / "t.jinja"
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        found.append(identity(data={"chat_template": str(template)}))
    for data in ({"loss_on": "all"}, {"on_long": "drop"}, {"validation": 0.5}, {"format": "text"}):
        found.append(identity(data=data))
    for source in (None, "auto", str(tmp_path / "t.jinja")):
        found.append(identity(eval={"source": source}))
    found.append(identity(settings={"train.packing": False}))
    (tmp_path / "held_out.txt").write_text("def other(): pass")
    found.append(identity())
    (tmp_path / "train.txt").write_text("def another(): pass")
    found.append(identity())
    monkeypatch.setattr(module, "ENCODING_VERSION", 0)
    found.append(identity())
    assert len(set(found)) == len(found)


def test_the_tokenizer_and_not_the_rest_of_its_folder(identity, tmp_path: Path):
    copy = shutil.copytree(TINY_FOLDER, tmp_path / "copy")
    same = identity(copy)
    assert same == identity()
    (copy / "model.safetensors").unlink()
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert identity(copy) == same
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert identity(copy) != same


def test_the_standard_library_is_known_by_its_contents(identity, monkeypatch, request):
    request.addfinalizer(module._stdlib_digest.cache_clear)

    def identity_of(**texts: list) -> str:
        monkeypatch.setattr(module, "stdlib_texts", texts.__getitem__)
        module._stdlib_digest.cache_clear()
        return identity(data={"source": "python_stdlib"})

    train = [("a", "b")]
    found = identity_of(train=train, held_out=[("c", "d")])
    assert identity_of(train=train, held_out=[("c", "d")]) == found
    assert identity_of(train=train, held_out=[("c", "e")]) != found
