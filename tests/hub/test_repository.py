"""Files reach the Hub in one commit, once, and never over something else.

The Hub is a stand-in on this machine, with which the unchanged huggingface_hub communicates.
"""

import logging
import socket

import httpx
import hub_server
import huggingface_hub
import pytest
from hub_server import READ_ONLY_TOKEN, in_process, push_files
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.formats.signed_card import signed_card
from hqqtrain.hub.repository import Repository, check_account, fingerprint_of

NAME = "alice/model"
CARD = signed_card("---\ntags:\n- hqqtrain\n---\nA card.\n").encode()
LARGE = {f"model-0000{n}-of-00003.safetensors": bytes([n]) * (1 << 20) for n in (1, 2, 3)}
FILES = {"config.json": b"{}", "README.md": CARD, **LARGE}


def _open(name: str = NAME, *, private: bool = True, holds_adapter: bool = False) -> Repository:
    return Repository.open(
        name, f"hub.push={name}", private=private, private_key="hub.private",
        holds_adapter=holds_adapter,
    )  # fmt: skip


def test_files_are_pushed_once(hub, tmp_path):
    (tmp_path / "weights").write_bytes(b"weights")
    files = {**FILES, "extra.safetensors": tmp_path / "weights"}
    assert push_files(NAME, files) == 6
    repo = hub.repos[NAME]
    assert repo.private
    assert repo.files.keys() == files.keys() | {".gitattributes"}
    assert len(hub.received) == 4
    assert push_files(NAME, files) == 0
    assert push_files(NAME, files | {"config.json": b"[]"}) == 1
    assert repo.titles == ["initial commit", "Push", "Push"]
    assert len(hub.received) == 4
    assert _open().url == f"{hub.url}/{NAME}"


def test_a_lost_connection_loses_no_file_that_was_sent(hub):
    hub.cut_off = set(range(2, 100))
    with pytest.raises(
        UserError, match=r"^hub.push=alice/model: the connection .* failed.* Again\.$"
    ):
        push_files(NAME, FILES)
    assert (len(hub.received), hub.repos[NAME].titles) == (1, ["initial commit"])
    hub.cut_off = set()
    assert push_files(NAME, FILES) == 5
    assert len(hub.received) == len(set(hub.received)) == 3


def test_a_push_that_was_killed_continues(hub, tmp_path):
    hub.held = 2
    process = in_process(push_files, hub.url, tmp_path / "other", NAME, FILES)
    assert hub.is_holding.wait(60)
    process.kill()
    process.join()
    hub.resume.set()
    assert hub.repos[NAME].titles == ["initial commit"]
    assert push_files(NAME, FILES) == 5
    assert len(hub.received) == len(set(hub.received)) == 3
    assert hub.uploads == 4  # the second file twice


def test_a_push_stops_between_two_files(hub):
    def stop() -> None:
        if hub.received:
            raise PreemptedError("SIGTERM was received")

    with pytest.raises(PreemptedError):
        _open().push(FILES, "Push", check=stop)
    assert len(hub.received) == 1


def test_weights_of_an_earlier_push_do_not_stay(hub):
    push_files(NAME, {"model.safetensors": b"old", "mine.gguf": b"mine", "README.md": CARD})
    push_files(NAME, FILES)
    assert hub.repos[NAME].files.keys() == FILES.keys() | {"mine.gguf", ".gitattributes"}


def test_a_card_that_was_edited_on_the_hub_is_kept(hub, caplog, tmp_path):
    push_files(NAME, FILES)
    edited = CARD.replace(b"A card", b"A better card")
    hub.repos[NAME].commits.append(hub.repos[NAME].files | {"README.md": edited})
    with caplog.at_level(logging.WARNING, "hqqtrain"):
        push_files(NAME, FILES | {"README.md": CARD + b"\n", "config.json": b"[]"})
    assert "the model card was edited on the Hub, and is kept" in caplog.text
    assert hub.text(NAME, "README.md") == edited.decode()
    (tmp_path / "README.md").write_bytes(b"the user's own")
    push_files(NAME, {"README.md": tmp_path / "README.md"})
    assert hub.text(NAME, "README.md") == "the user's own"


@pytest.mark.parametrize(
    ("files", "adapter", "message"),
    [
        ({"model.safetensors": b"x"}, False, "weights that hqqtrain has not pushed"),
        ({"x.gguf": b"x", "README.md": b"---\ntags: [x]\n---"}, False, "choose another name"),
        ({"adapter_config.json": b"{}", "a.safetensors": b"x"}, False, "has an adapter, and would"),
        ({"model.safetensors": b"x", "README.md": CARD}, True, "has a model, and would get an ada"),
        ({"model.safetensors": b"x", "README.md": CARD}, False, None),
        ({"README.md": b"mine", "LICENSE": b"MIT"}, True, None),
    ],
)
def test_another_model_is_not_replaced(hub, files, adapter, message):
    hub.add(NAME, files)
    if message is None:
        _open(holds_adapter=adapter)
        return
    with pytest.raises(UserError, match=message):
        _open(holds_adapter=adapter)


def test_the_visibility(hub, caplog):
    hub.add(NAME, {}, private=False)
    with pytest.raises(UserError, match=r"is a public repository, and hub.private=true; choose"):
        _open()
    assert not _open(private=False).is_private
    hub.add("alice/secret", {})
    with caplog.at_level(logging.WARNING, "hqqtrain"):
        assert _open("alice/secret", private=False).is_private
    assert "alice/secret: stays private" in caplog.text
    assert not _open("alice/new", private=False).is_private


def test_an_account_that_cannot_write(hub, monkeypatch):
    for name in ("bob/model", "bob/public"):
        hub.add("bob/public", {}, private=False)
        with pytest.raises(UserError, match=f"^hub.push={name}: the token may not write there"):
            _open(name, private=False)
    monkeypatch.setenv("HF_TOKEN", READ_ONLY_TOKEN)
    with pytest.raises(UserError, match="use one with write access"):
        _open()
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="does not accept the token; log in with `hf auth login`"):
        _open()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/such/file")
    with pytest.raises(UserError, match="needs a token with write access: log in"):
        _open()
    assert NAME not in hub.repos


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 is set; unset it, or push the finished"):
        check_account("hub.push=alice/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    huggingface_hub.close_session()
    with pytest.raises(UserError, match=r"the connection to the Hub has failed \(Connect"):
        check_account("hub.push=alice/model")


def test_somebody_else_pushes_at_the_same_time(hub):
    def other() -> None:
        repo = hub.repos[NAME]
        repo.commits.append(repo.files | {"other.txt": b""})

    with pytest.raises(UserError, match="somebody else has pushed to it at the same time"):
        _open().push({"config.json": b"{}"}, "Push", check=other)


def test_a_repository_that_somebody_else_creates_now(hub, monkeypatch):
    hub.add(NAME, {}, private=False)
    find, calls = HfApi.model_info, []

    def model_info(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise RepositoryNotFoundError(
                "no", response=httpx.Response(404, request=httpx.Request("GET", "http://x"))
            )
        return find(*arguments, **options)

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(UserError, match="is a public repository, and"):
        _open()


@pytest.mark.parametrize("route", ["whoami", "info", "tree", "preupload", "batch", "commit"])
def test_an_answer_of_another_kind(hub, monkeypatch, route):
    def answer(handler, *_, **__) -> None:
        handler._body()
        handler._answer(200, "text")

    monkeypatch.setattr(hub_server._Handler, route, answer)
    with pytest.raises(UserError, match="the answer of the Hub cannot be read"):
        push_files(NAME, FILES)


def test_the_fingerprint_of_a_repository(hub):
    assert fingerprint_of(NAME, "x") is None
    hub.add(NAME, {"config.json": b'{"quantization_config": {"fingerprint": "sha256:1"}}'})
    assert fingerprint_of(NAME, "x") == "sha256:1"
    for text in (b"{}", b'{"quantization_config": null}', b"[]", b'{"quantization_config": [1]}'):
        hub.add(NAME, {"config.json": text})
        assert fingerprint_of(NAME, "x") is None
