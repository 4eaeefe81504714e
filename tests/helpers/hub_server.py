"""A local server with the endpoints of the Hugging Face hub that uploads and downloads of small models need."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
"""Access token for uploads and for private repositories."""


@dataclass
class Repository:
    """A model repository.

    Attributes:
        private: whether reading it needs the token.
        commits: files of each commit by its identifier, the newest last.
        revisions: commit by branch or tag.
        messages: message of each commit.
    """

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict[str, dict[str, bytes]])
    revisions: dict[str, str] = field(default_factory=dict[str, str])
    messages: list[str] = field(default_factory=list[str])

    def commit(self, files: dict[str, bytes], message: str = "") -> str:
        """Add files to the branch `main`; returns the identifier of the commit."""
        before = self.commits.get(self.revisions.get("main", ""), {})
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = before | files
        self.revisions["main"] = oid
        self.messages.append(message)
        return oid


class Hub(http.server.ThreadingHTTPServer):
    """The server.

    Attributes:
        url: value for HF_ENDPOINT.
        repositories: repositories by name.
        requests: method and path of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub without repositories."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    @property
    def _is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if not self._is_authorized:
            return self._error(401, "Unauthorized")
        if path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content.get('organization') or 'me'}/{content['name']}"
            if name in self.server.repositories:
                return self._answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
            is_private = content.get("private") or content.get("visibility") == "private"
            self.server.repositories[name] = Repository(bool(is_private))
            return self._answer(200, {"url": f"{self.server.url}/{name}"})
        name, _, action = path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
        if name not in self.server.repositories:
            return self._error(404, "RepoNotFound")
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        oid = self.server.repositories[name].commit(files, message)
        return self._answer(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}
        )

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = match[1] if match else file[1] if file else ""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._is_authorized):
            return self._error(404 if self._is_authorized else 401, "RepoNotFound")
        revision = (match[3] if match else file[2] if file else None) or "main"
        commit = repository.revisions.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None and revision != "main":
            return self._error(404, "RevisionNotFound")
        files = files or {}
        if file:
            content = files[file[3]]
            return self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)
        if match and match[2] == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            return self._answer(200, tree)
        return self._answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": []})

    do_HEAD = do_GET
