"""A stand-in for the Hugging Face Hub on this machine: what an upload and a download of a model ask of it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "hf_of_alice"
OWN = ("alice", "lab")  # where the token may write


class Hub:
    """Repositories by name, each with its commits; a commit is all files of the repository."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuse_uploads = False

    def files(self, name: str) -> dict[str, bytes]:
        """The files of a repository's last commit."""
        return self.commits[name][-1]


@contextlib.contextmanager
def running() -> Iterator[tuple[Hub, str]]:
    """A hub, and the address that it answers at."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        name, action = self._repository(path)
        if name.split("/")[0] not in OWN:
            return self._refuse(403, "you may not write here")
        if action == "preupload/main":
            files = [
                {"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if action == "info/lfs/objects/batch":
            return self._batch(json.loads(body)["objects"])
        assert action == "commit/main", path
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        body = self._body()
        if self.hub.refuse_uploads:
            return self._refuse(507, "no room")
        self.hub.large[self.path.rpartition("/")[2]] = body
        return self._send(200, b"")

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        name, action = self._repository(path)
        visible = not self.hub.private.get(name, True) or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.hub.private or not visible:
            return self._refuse(404, "Repository not found", "RepoNotFound")
        commits = self.hub.commits[name]
        if not action:
            return self._json({"id": name, "private": self.hub.private[name], "sha": _sha(name, len(commits))})
        content = commits[-1].get(action.removeprefix("resolve/main/"))
        head = {"X-Repo-Commit": _sha(name, len(commits))}
        if content is None:
            return self._refuse(404, "Entry not found", "EntryNotFound", head)
        return self._send(200, content, {**head, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    do_HEAD = do_GET

    def _create(self, wish: dict[str, Any]) -> None:
        if wish["organization"] not in OWN:
            return self._refuse(403, f"You don't have the rights to create a model under {wish['organization']!r}")
        name = f"{wish['organization']}/{wish['name']}"
        there = name in self.hub.private
        if not there:
            self.hub.private[name] = wish.get("visibility") == "private" or bool(wish.get("private"))
            self.hub.commits[name] = [{}]
        url = f"http://{self.headers['Host']}/{name}"
        return self._json({"url": url, "name": name}, 409 if there else 200)

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        made = [
            {**one, "actions": {"upload": {"href": f"http://{self.headers['Host']}/large/{one['oid']}"}}}
            for one in objects
        ]
        self._json({"transfer": "basic", "objects": made})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.files(name))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
        self.hub.commits[name].append(files)
        sha = _sha(name, len(self.hub.commits[name]))
        self._json({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{sha}", "commitOid": sha})

    def _repository(self, path: str) -> tuple[str, str]:
        """`/api/models/USER/NAME/…`, `/USER/NAME.git/…` or `/USER/NAME/…`: the name, and what comes after it."""
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?", path)
        assert match, path
        return match[1], match[2] or ""

    def _body(self) -> bytes:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, message: str, code: str = "", head: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(head or {})}
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **extra})

    def _send(self, status: int, content: bytes, head: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(head or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _sha(name: str, count: int) -> str:
    return hashlib.sha1(f"{name} {count}".encode()).hexdigest()
