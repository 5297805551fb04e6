"""An unreachable, silent or gated hub, or an unknown name, gives a message without long waiting.

The first tests connect to real sockets of this machine through the unchanged huggingface_hub. The
hub's own replies are raised by a fake client, as the real client raises them.
"""

import importlib
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants, errors
from huggingface_hub.utils import filter_repo_objects

from hqqtrain.common.errors import UserError
from hqqtrain.config.model import ModelConfig
from hqqtrain.models import hub
from hqqtrain.models.source import resolve_source

httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
"""The HTTP library of huggingface_hub: httpx, or since its version 2 httpx2."""


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub_at(monkeypatch):
    def point(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        close_session()

    yield point
    close_session()


def test_the_files_of_the_model_and_all_of_its_chat_templates_are_downloaded():
    needed = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model",
        "merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    others = [
        "consolidated.safetensors", "model.fp16.safetensors", "original/tokenizer.model",
        "onnx/config.json", "onnx/model.onnx", "original/consolidated.00.pth", "tf_model.h5",
        "metal/model.safetensors", "original/params.json", "onnx/merges.txt",
    ]  # fmt: skip
    found = filter_repo_objects(
        [*needed, *others],
        allow_patterns=[*hub._CONFIG_PATTERNS, "*.safetensors", "qmodel.pt"],
        ignore_patterns=hub._IGNORED_PATTERNS,
    )
    assert list(found) == needed


def test_a_hub_that_refuses_connections(hub_at):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hub_at(f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(UserError, match=r"owner/name: no folder .* cannot be reached"):
            resolve_source(ModelConfig(name_or_path="owner/name"))


def test_a_hub_that_accepts_and_never_answers(hub_at, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub_at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match="cannot be reached"):
            resolve_source(ModelConfig(name_or_path="owner/name"))
    assert time.monotonic() - start < 8


def test_offline_is_respected(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"owner/name: .*offline mode"):
        resolve_source(ModelConfig(name_or_path="owner/name"))


def test_a_name_the_hub_cannot_have():
    with pytest.raises(UserError, match="neither a folder nor a hub name"):
        resolve_source(ModelConfig(name_or_path="what is this?"))


def _response(status: int):
    return httpx.Response(status, request=httpx.Request("GET", "https://hub/api"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("x", response=_response(403)), "gated.*hf auth login"),
        (errors.RepositoryNotFoundError("x", response=_response(404)), "neither a folder here nor"),
        (
            errors.RevisionNotFoundError("x", response=_response(404)),
            r"model\.revision=v9: .*no such",
        ),
        (errors.HfHubHTTPError("x", response=_response(503)), "cannot be reached"),
        (httpx.ReadTimeout("timed out"), r"cannot be reached \(timed out\)"),
    ],
)
def test_replies_of_the_hub_become_messages(monkeypatch, error, message):
    def refuse(*_, local_files_only=False, **__):
        raise errors.LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.setattr(hub, "_request_metadata", lambda *_: None)
    with pytest.raises(UserError, match=message):
        resolve_source(ModelConfig(name_or_path="owner/name", revision="v9"))


def test_the_revision_and_only_the_needed_files_are_requested(monkeypatch, checkpoint):
    asked = {}

    def download(name, **more):
        asked.update(more, name=name)
        return str(checkpoint)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "_request_metadata", lambda *_: None)
    model = ModelConfig(name_or_path="owner/name", revision="v9")
    assert resolve_source(model).path == Path(checkpoint)
    assert (asked["name"], asked["revision"]) == ("owner/name", "v9")
    assert "*.safetensors" in asked["allow_patterns"]
    pickles = [p for p in asked["allow_patterns"] if "bin" in p or "pt" in p or "pickle" in p]
    assert pickles == ["qmodel.pt"]  # hqq's own, which is read with care
    resolve_source(model, weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]


def test_a_model_in_the_cache_needs_no_hub(monkeypatch, checkpoint, tmp_path):
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    checkpoint.rename(snapshot)
    refs = tmp_path / "cache" / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_source(ModelConfig(name_or_path="owner/name")).path == snapshot


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_model(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hf"))
    monkeypatch.setattr(hub, "_request_metadata", lambda *_: None)
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *_, **__: (tmp_path / "file" / "hf").mkdir(parents=True)
    )
    with pytest.raises(UserError) as caught:
        resolve_source(ModelConfig(name_or_path="owner/name"))
    assert str(caught.value).startswith(f"HF_HOME={tmp_path}/file/hf: the cache of Hugging Face")
    assert "Not a directory" in str(caught.value)
