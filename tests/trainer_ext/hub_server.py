"""A Hub on this machine: the endpoints that huggingface_hub's client uses to publish and load."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".pt", ".pth")
TOKEN = "hf_" + "A" * 34


@dataclass
class Hub:
    """What the server holds, and how it is to fail.

    Attributes:
        repos: repository -> branch -> file -> content.
        lfs: content of large files by their SHA-256.
        faults: (method, pattern of the path) -> statuses of the next answers; 0 cuts the line.
        requests: methods and paths, as they came.
    """

    endpoint: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    faults: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    commits: int = 0
    private: set[str] = field(default_factory=set)

    def count(self, pattern: str) -> int:
        """How many requests had this in them."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def files(self, repo: str, revision: str) -> dict[str, bytes]:
        """Of a branch, or of a commit, each of which is the main branch's last."""
        branches = self.repos.get(repo, {})
        return branches.get(revision, branches.get("main", {}))

    def next_fault(self, method: str, path: str) -> int | None:
        """The status that a request is to get, if any."""
        for (of_method, pattern), statuses in self.faults.items():
            if of_method == method and statuses and re.search(pattern, path):
                return statuses.pop(0)
        return None


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _serve(self) -> None:
        path = unquote(self.path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunked()
        fault = self.hub.next_fault(self.command, path)
        if fault == 0:
            self.close_connection = True
            self.connection.close()
            return
        if fault is not None:
            self._answer({"error": f"as asked: {fault} {TOKEN}"}, fault)
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs-store/" not in path:
            self._answer({"error": "Invalid username or password."}, 401)
            return
        for pattern, answer in ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                answer(self, body, *found.groups())
                return
        self._answer({"error": f"no such endpoint: {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815  names of http.server

    def _chunked(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        content = b""
        while size := int(self.rfile.readline().strip(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- endpoints ---

    def create_repo(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = "/".join(filter(None, [wanted.get("organization") or "me", wanted["name"]]))
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            self._answer({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.repos[name] = {"main": {}}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        self._answer({"url": url, "name": name})

    def validate_card(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        good = text.startswith("---\n") and "\n---\n" in text
        errors = [] if good else [{"message": "no metadata"}]
        self._answer({"errors": errors, "warnings": []}, 200 if good else 400)

    def branch(self, body: bytes, repo: str, name: str) -> None:
        branches = self.hub.repos[repo]
        status = 409 if name in branches else 200
        branches.setdefault(name, dict(branches["main"]))
        self._answer({} if status == 200 else {"error": "exists"}, status)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for entry in json.loads(body)["files"]
        ]
        self._answer({"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                base = f"{self.hub.endpoint}/lfs-store/{wanted['oid']}"
                actions = {"upload": {"href": base}, "verify": {"href": f"{base}/verify"}}
                entry["actions"] = actions
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.hub.lfs[oid] = body
        self._answer({}, 200 if good else 400)

    def lfs_verify(self, body: bytes, oid: str) -> None:
        known = self.hub.lfs.get(json.loads(body)["oid"])
        self._answer({}, 200 if known is not None else 404)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = dict(self.hub.repos[repo][revision])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        self.hub.repos[repo][revision] = files
        self.hub.commits += 1
        number = f"{self.hub.commits:040x}"
        url = f"{self.hub.endpoint}/{repo}/commit/{number}"
        self._answer({"success": True, "commitOid": number, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, repo: str, revision: str | None) -> None:
        branches = self.hub.repos.get(repo)
        if branches is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        files = self.hub.files(repo, revision or "main")
        siblings = [{"rfilename": name} for name in files]
        sha = f"{self.hub.commits:040x}"
        self._answer({"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None) -> None:
        files = self.hub.files(repo, revision)
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
            for name, content in files.items()
            if name.startswith((folder or "").lstrip("/"))
        ]
        self._answer(entries)

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        content = self.hub.files(repo, revision).get(name)
        sha = f"{self.hub.commits:040x}"
        if content is None:
            headers = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": sha}
            self._answer({"error": "Entry not found"}, 404, **headers)
            return
        self._answer(content, ETag=f'"{_etag(content)}"', X_Repo_Commit=sha)


ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", Handler.create_repo),
    (r"POST /api/validate-yaml", Handler.validate_card),
    (r"POST /api/models/(.+/.+)/branch/(.+)", Handler.branch),
    (r"POST /api/models/(.+/.+)/preupload/(.+?)", Handler.preupload),
    (r"POST /(.+/.+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs-store/(\w+)", Handler.lfs_put),
    (r"POST /lfs-store/(\w+)/verify", Handler.lfs_verify),
    (r"POST /api/models/([^/]+/[^/]+)/commit/(.+?)", Handler.commit),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/?]+)(/[^?]*)?(?:\?.*)?", Handler.tree),
    (r"GET /api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?", Handler.info),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(?:\?.*)?", Handler.resolve),
]


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A Hub that serves while the context lasts."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
