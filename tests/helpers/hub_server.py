"""A stand-in for the Hugging Face Hub: repositories in memory, behind the Hub's HTTP interface.

It has what huggingface_hub and transformers need to create, fill, list and load a repository of a
model: accounts, `repos/create`, `preupload`, Git LFS with its basic transfer, `commit`, `tree` and
`resolve`. It has no Xet storage, so clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from forkserver import fork_context
from huggingface_hub import constants, hf_api

TOKEN, READ_ONLY_TOKEN = "stand-in-token-of-alice", "read-only-token-of-alice"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass
class Repo:
    """A repository: its visibility, and the files of each commit, as bytes or as an LFS oid."""

    private: bool
    commits: list[dict[str, bytes | str]] = field(
        default_factory=lambda: [{".gitattributes": b"*.safetensors filter=lfs\n"}]
    )
    titles: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def files(self) -> dict[str, bytes | str]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class HubServer:
    """The state of the stand-in, which tests read and change.

    Attributes:
        repos: The repositories by name.
        objects: LFS oid -> content.
        received: The oids that were sent, in order.
        requests: "METHOD path" of every request.
        uploads: The number of uploads that have begun.
        cut_off: Numbers of the uploads whose connection is cut off halfway.
        held: The number of an upload that stops halfway until `resume` is set, and is lost then.
        is_holding: Set once it has stopped.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[str] = []
        self.requests: list[str] = []
        self.cut_off: set[int] = set()
        self.held: int | None = None
        self.is_holding, self.resume = threading.Event(), threading.Event()
        self.uploads = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.resume.set()
        self._http.shutdown()
        self._http.server_close()

    def text(self, repo: str, name: str) -> str:
        """Return the text of a file."""
        content = self.repos[repo].files[name]
        return (self.objects[content] if isinstance(content, str) else content).decode()

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = True) -> None:
        """Create a repository with files."""
        self.repos[repo] = Repo(private)
        self.repos[repo].commits.append(self.repos[repo].files | files)


@contextmanager
def as_hub(url: str, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process use a stand-in, though it has imported huggingface_hub before.

    Args:
        url: The address of the stand-in.
        cache: The folder for what is downloaded.
        patch: Restores everything at its end.
    """
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(hf_api.api, "endpoint", url)  # of the functions that are no methods
    patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    # A failed request is tried again after 1, 2, 4 and 8 seconds.
    patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Return a stand-in that this process uses as the Hub, as the user alice."""
    server = HubServer()
    with as_hub(server.url, tmp_path / "hf-cache", monkeypatch):
        yield server
    server.close()


def in_process(function: Callable[..., object], url: str, cache: Path, *arguments: Any) -> Any:
    """Start and return a process that calls a function, with the stand-in as its Hub."""
    process = fork_context().Process(target=_call, args=(function, url, cache, *arguments))
    process.start()
    return process


def _call(function: Callable[..., object], url: str, cache: Path, *arguments: Any) -> None:
    with pytest.MonkeyPatch.context() as patch, as_hub(url, cache, patch):
        function(*arguments)


def push_files(name: str, files: dict[str, bytes]) -> int:
    """Push files to a private repository for a model, and return the number that was sent."""
    from hqqtrain.hub.repository import Repository

    repository = Repository.open(
        name, f"hub.push={name}", private=True, private_key="hub.private", holds_adapter=False
    )
    return repository.push(files, "Push", advice="Again.")


def push_on_ranks(rank: int, comm: Any, url: str, config: Any, cache: Path) -> None:
    """Push a finished run on several ranks, and then where alice may not write."""
    from hqqtrain.distributed.preemption import PreemptionHandler
    from hqqtrain.tasks.push import push_results

    with pytest.MonkeyPatch.context() as patch, as_hub(url, cache, patch):
        if rank > 0:
            patch.delenv("HF_TOKEN")  # the other ranks need none
        for config.hub.push in ("alice/model", "bob/model"):
            push_results(config, comm, PreemptionHandler(config.run))


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one packet, for which the client does not wait 40 ms

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_POST = do_PUT = do_HEAD = do_GET

    def _route(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, name in _ROUTES:
            if match := re.fullmatch(pattern, path):
                getattr(self, name)(**match.groupdict())
                return
        self._answer(404, {"error": f"no such route: {path}"})

    def _answer(self, code: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **names}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, code: int, error_code: str) -> None:
        self._body()
        self._answer(code, {"error": error_code}, X_Error_Code=error_code, X_Error_Message="no")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def _account(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return "alice" if token in (TOKEN, READ_ONLY_TOKEN) else None

    def _may_write(self, owner: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return token == TOKEN and owner == "alice"

    def _repo(self, repo: str) -> Repo | None:
        """Return a repository that the account can see; answer 404 if there is none."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self._account is None):
            self._error(404, "RepoNotFound")
            return None
        return found

    def whoami(self) -> None:
        if self._account is None:
            self._answer(401, {"error": "Invalid username or password."})
        else:
            self._answer(200, {"name": self._account, "type": "user", "orgs": []})

    def validate(self) -> None:
        self._body()
        self._answer(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        body = json.loads(self._body())
        name = f"{body['organization'] or 'alice'}/{body['name']}"
        if not self._may_write(name.split("/")[0]):
            return self._answer(403, {"error": "You don't have the rights to create a model"})
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        is_private = body.get("private") or body.get("visibility") == "private"
        self.hub.repos[name] = Repo(bool(is_private))
        return self._answer(200, {"url": url, "name": name})

    def info(self, repo: str, revision: str = "main") -> None:
        if found := self._repo(repo):
            siblings = [{"rfilename": name} for name in found.files]
            facts = {"_id": repo, "id": repo, "modelId": repo, "private": found.private,
                     "sha": found.sha, "siblings": siblings, "tags": [], "downloads": 0,
                     "likes": 0}  # fmt: skip
            self._answer(200, facts)

    def tree(self, repo: str, revision: str) -> None:
        if found := self._repo(repo):
            self._answer(200, [self._entry(*item) for item in found.files.items()])

    def _entry(self, path: str, content: bytes | str) -> dict[str, Any]:
        if isinstance(content, str):
            size = len(self.hub.objects[content])
            lfs = {"oid": content, "size": size, "pointerSize": 134}
            return {"type": "file", "path": path, "size": size, "oid": "0" * 40, "lfs": lfs}
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}

    def preupload(self, repo: str, revision: str) -> None:
        body, found = json.loads(self._body()), self._repo(repo)
        if found is None:
            return
        if not self._may_write(repo.split("/")[0]):
            self._answer(403, {"error": "Your token may not write here"})
            return
        files = []
        for file in body["files"]:
            content = found.files.get(file["path"])
            entry = self._entry(file["path"], content) if content is not None else {}
            oid = entry.get("lfs", entry).get("oid")
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False,
                          "oid": oid})  # fmt: skip
        self._answer(200, {"files": files})

    def batch(self, repo: str) -> None:
        objects = json.loads(self._body())["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/objects/{item['oid']}"
                item["actions"] = {"upload": {"href": href}}
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        self.hub.uploads += 1
        number, size = self.hub.uploads, int(self.headers["Content-Length"])
        content = self.rfile.read(size // 2)
        if number == self.hub.held:
            self.hub.is_holding.set()
            self.hub.resume.wait(60)
        if number in (*self.hub.cut_off, self.hub.held):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content += self.rfile.read(size - len(content))
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.hub.received.append(oid)
        self._answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        lines, found = self._body().splitlines(), self._repo(repo)
        if found is None:
            return
        files = dict(found.files)
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit", found.sha) != found.sha:
                    return self._answer(412, {"error": "A commit has happened since."})
                found.titles.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.hub.objects
                files[value["path"]] = value["oid"]
            else:
                del files[value["path"]]
        found.commits.append(files)
        url = f"{self.hub.url}/{repo}/commit/{found.sha}"
        return self._answer(200, {"success": True, "commitOid": found.sha, "commitUrl": url})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if (found := self._repo(repo)) is None:
            return
        if name not in found.files:
            self._error(404, "EntryNotFound")
            return
        content = found.files[name]
        data = self.hub.objects[content] if isinstance(content, str) else content
        entry = self._entry(name, content)
        etag = entry.get("lfs", entry)["oid"]
        self._answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=found.sha,
                     X_Linked_Etag=f'"{etag}"', X_Linked_Size=str(len(data)))  # fmt: skip


_NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"/api/whoami-v2", "whoami"),
    (r"/api/validate-yaml", "validate"),
    (r"/api/repos/create", "create"),
    (rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)", "tree"),
    (rf"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"/api/models/{_NAME}/commit/(?P<revision>[^/]+)", "commit"),
    (rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", "info"),
    (rf"/api/models/{_NAME}", "info"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"/objects/(?P<oid>\w+)", "store"),
    (rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
)
