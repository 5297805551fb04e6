"""The ways to load a result; tests/tasks/test_push.py runs those of an adapter."""

import ast
import re

import pytest

from hqqtrain.config.export import EXPORT_FORMATS
from hqqtrain.hub.loading_text import how_to_load_adapter, how_to_load_export, how_to_load_model


def _programs(text: str) -> list[str]:
    return re.findall("^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("export_format", EXPORT_FORMATS)
def test_every_format_has_a_text(export_format):
    alone = how_to_load_export("alice/x", export_format, has_adapter=False, file="x.gguf")
    both = how_to_load_export("alice/x", export_format, has_adapter=True, file="x.gguf")
    assert "alice/x" in alone
    assert both.startswith(alone)
    assert "adapter" in both.removeprefix(alone)
    assert "{" not in both
    for program in _programs(both):
        ast.parse(program)


def test_a_quantized_model_needs_hqqtrain():
    (program,) = _programs(how_to_load_model("alice/x"))
    assert program.startswith("import hqqtrain")


def test_an_adapter_on_its_base():
    options = {"is_quantized": False, "has_tokenizer": False, "has_new_tokens": False}
    (program,) = _programs(how_to_load_adapter("alice/x", "alice/base", **options))
    assert "hqqtrain" not in program
    assert 'AutoTokenizer.from_pretrained("alice/base")' in program
    options = dict.fromkeys(options, True)
    (program,) = _programs(how_to_load_adapter("alice/x", "alice/base", **options))
    assert program.startswith("import hqqtrain")
    assert 'AutoTokenizer.from_pretrained("alice/x")\nmodel.resize_token_embeddings' in program
