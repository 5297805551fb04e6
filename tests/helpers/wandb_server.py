"""A fake W&B server with just enough of GraphQL and of the file stream for a run.

It stores the history by line number, as the real server does: sending line 0 again overwrites it.
"""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"


class FakeWandbServer:
    """Use as a context manager; `history` maps a line number to the received row."""

    def __init__(self) -> None:
        self.history: dict[int, dict[str, Any]] = {}
        self.requests: list[str] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "FakeWandbServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def environment(self) -> dict[str, str]:
        """Return the variables that make wandb use this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def rows(self) -> list[dict[str, Any]]:
        """Return the received rows, in order."""
        return [self.history[number] for number in sorted(self.history)]

    def stop(self) -> None:
        """Stop the server; later connections are refused."""
        self._http.shutdown()
        self._http.server_close()

    def respond(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Store the rows of a request to the file stream, or answer a GraphQL operation."""
        if path.endswith("/file_stream"):
            part = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for number, line in enumerate(part["content"], part["offset"]):
                self.history[number] = json.loads(line)
            return {}
        operation = re.search(r"(?:query|mutation)\s+(\w+)", body.get("query", ""))
        self.requests.append(operation[1] if operation else path)
        return {"data": self._data(self.requests[-1], body.get("variables") or {})}

    def _data(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"name": "p", "entity": {"name": "e"}}
        match operation:
            case "Viewer":
                return {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}",
                                   "teams": {"edges": []}}}  # fmt: skip
            case "UpsertBucket":
                run = {"id": "b", "name": variables.get("name"), "displayName": "d", "config": "{}",
                       "sweepName": None, "project": project, "historyLineCount": None}  # fmt: skip
                return {"upsertBucket": {"bucket": run, "inserted": not self.history}}
            case "RunResumeStatus":
                last = json.dumps([json.dumps(self.history[max(self.history)])] if self.history
                                  else [])  # fmt: skip
                run = {"id": "b", "name": variables.get("name"), "summaryMetrics": "{}",
                       "displayName": "d", "logLineCount": 0, "historyLineCount": len(self.history),
                       "eventsLineCount": 0, "historyTail": last, "eventsTail": "[]",
                       "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}  # fmt: skip
                return {"model": {"id": "m", "name": "p", "entity": {"id": "e", "name": "e"},
                                  "bucket": run if self.history else None}}  # fmt: skip
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/file"}
                         for name in variables.get("files", [])]  # fmt: skip
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case _:
                return {}


def _handler(server: FakeWandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            is_json = "json" in self.headers.get("Content-Type", "")
            self._send(server.respond(self.path, json.loads(body) if is_json else {}))

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._send({})

        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def _send(self, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
