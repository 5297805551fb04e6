"""Without the package gguf, the user learns how to install it."""

import sys

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.export import ExportConfig
from hqqtrain.formats.gguf.package import import_gguf
from hqqtrain.formats.registry import FORMATS


def test_the_package_is_imported():
    assert import_gguf().GGUFWriter


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install \"hqqtrain\[gguf\]\""):
        FORMATS["gguf"].configured(ExportConfig(format="gguf"))
