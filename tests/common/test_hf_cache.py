"""Errors of the cache of Hugging Face are told from those of the network and of data."""

import errno
from pathlib import Path

import pytest

from hqqtrain.common.hf_cache import hf_cache_error, hf_home


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_the_folder_is_that_of_huggingface_hub(monkeypatch):
    assert hf_home() == str(Path.home() / ".cache" / "huggingface")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hf_home() == "/x/huggingface"
    monkeypatch.setenv("HF_HOME", "/y")
    assert hf_home() == "/y"


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_an_error_of_the_system_is_found_behind_others(monkeypatch, link):
    monkeypatch.setenv("HF_HOME", "/full")
    error = ValueError("Couldn't find the data set")
    setattr(error, link, OSError(errno.ENOSPC, "No space left on device", "/full/hub/x"))
    message = str(hf_cache_error(error))
    assert message.startswith("HF_HOME=/full: the cache")
    assert "No space left on device: /full/hub/x" in message
    assert "(set here: HF_HOME)" in message


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError("no number"), ConnectionError(errno.ECONNREFUSED, "refused")]
)
def test_other_errors_are_not_of_the_cache(error):
    assert hf_cache_error(error) is None
