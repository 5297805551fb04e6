"""The tokenizer that a run trains with is the one that it saves."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.data.chat.library import chat_template_source
from hqqtrain.models.source import TINY_FOLDER, ModelSource
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks.token_identity import token_identity
from hqqtrain.tasks.tokenizer import prepare_tokenizer

CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
OWN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def source(tmp_path) -> ModelSource:
    """Return a model whose tokenizer has a template, and a token for the end of a turn."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    return ModelSource("m", tmp_path, "dense")


def test_without_settings_it_is_that_of_the_model(source):
    assert prepare_tokenizer(source, DataConfig()) is source
    assert source.tokenizer == source.path


@pytest.mark.parametrize("in_config", [True, False])
def test_the_template_replaces_that_of_the_model(source, in_config):
    if in_config:  # as older versions of transformers have written it
        config = source.path / "tokenizer_config.json"
        config.write_text(config.read_text().replace("{", '{"chat_template": "other",', 1))
        (source.path / "chat_template.jinja").unlink()
    prepared = prepare_tokenizer(source, DataConfig(chat_template="chatml"))
    assert prepared.trained_token_ids == ()
    names = {path.name for path in prepared.tokenizer.iterdir()}
    assert names == {path.name for path in source.path.iterdir()} | {"chat_template.jinja"}
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    assert tokenizer.chat_template == chat_template_source("chatml")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text.endswith("<|im_start|>assistant\nThat.<|im_end|>\n")


def test_missing_markers_are_added_and_the_template_of_the_model_stays(source):
    prepared = prepare_tokenizer(source, DataConfig(add_tokens=["<|call|>", "<|im_end|>"]))
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    # The one that exists is trained, too.
    assert prepared.trained_token_ids == tuple(
        tokenizer.convert_tokens_to_ids(["<|call|>", "<|im_end|>"])
    )
    assert tokenizer.chat_template == OWN
    ids = tokenizer("a<|call|>b")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert tokenizer.tokenize("a<|call|>b") == ["a", "<|call|>", "b"]
    auto = prepare_tokenizer(source, DataConfig(chat_template="chatml", add_tokens="auto"))
    (new,) = auto.trained_token_ids
    assert (
        AutoTokenizer.from_pretrained(auto.tokenizer).convert_ids_to_tokens(new) == "<|im_start|>"
    )


def test_markers_need_a_template(source):
    shutil.copy(TINY_FOLDER / "tokenizer_config.json", source.path)
    (source.path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        prepare_tokenizer(source, DataConfig(add_tokens="auto"))


@pytest.mark.parametrize(
    ("tokens", "is_allowed"),
    [(None, True), ("auto", True), (["<a>"], True), ([], True), ("<a>", False), ([" "], False),
     ([1], False), ({"a": 1}, False)],
)  # fmt: skip
def test_add_tokens_is_a_list_or_auto(tokens, is_allowed):
    errors = list(DataConfig(add_tokens=tokens).errors())
    assert [error.startswith("data.add_tokens=") for error in errors] == [True] * (not is_allowed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a tokenizer whose class follows from config.json alone, with a template for tools."""
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    shutil.copy(TINY_FOLDER / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (folder / "chat_template.jinja").write_text("default")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    return folder


@pytest.mark.parametrize("tokens", [None, ("<|new|>",)])
def test_a_template_changes_no_token(folder: Path, tokens):
    source = ModelSource("model", folder, "dense")
    data = DataConfig(chat_template="chatml", add_tokens=tokens)
    before, after = (
        load_tokenizer(folder),
        load_tokenizer(prepare_tokenizer(source, data).tokenizer),
    )
    assert type(after) is type(before)
    text = "It's 12345,\n\n  and e\u0301te\u0301."
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.get_chat_template(None, [{}]) == after.get_chat_template()  # that of `data`
    assert before.get_chat_template(None, [{}]) == "tools"


def test_whatever_changes_the_loaded_tokenizer_changes_its_identity(folder: Path):
    def identity() -> str:
        found = token_identity(RunConfig(), load_tokenizer(folder), folder)["tokenizer"]
        return json.dumps(found)

    seen = {identity()}
    for name, content in (
        ("config.json", '{"model_type": "gpt2"}'),
        ("additional_chat_templates/tool_use.jinja", "other"),
        ("chat_template.jinja", "another"),
    ):
        (folder / name).write_text(content)
        seen.add(identity())
    assert len(seen) == 4
    assert identity() in seen
