"""The Hub on loopback: a small server that speaks what huggingface_hub asks of it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import huggingface_hub
from huggingface_hub import constants


class Hub(ThreadingHTTPServer):
    """Repositories of files, in memory: {repository: {revision: {path: content}}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.claimed: dict[str, int] = {}  # sizes that differ from the content's
        self.tokens: list[str | None] = []
        self.sent: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked hung up."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", size: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, **fields: Any) -> None:
        self.answer(200, json.dumps(fields).encode(), Content_Type="application/json")

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        if repo not in self.server.repos:
            self.answer(404, X_Error_Code="RepoNotFound")
        else:
            branches = self.server.repos[repo]
            found = branches.get(revision, next((b for b in branches.values() if commit_of(b) == revision), None))
            if found is None:
                self.answer(404, X_Error_Code="RevisionNotFound")
            return found
        return None

    def do_HEAD(self) -> None:
        owner, name, kind, revision, path = self.path.lstrip("/").split("/", 4)
        assert kind == "resolve"
        if (files := self.files(f"{owner}/{name}", revision)) is None:
            return
        if path not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(files))
            return
        if self.command == "GET":
            self.server.sent.append(path)
        body = files[path]
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        self.answer(200, body, self.server.claimed.get(path), ETag=etag, X_Repo_Commit=commit_of(files))

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization"))
        if "/resolve/" in self.path:
            self.do_HEAD()
        else:
            self.answer(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.split("?")[0].lstrip("/").split("/")
        if parts[1:] == ["validate-yaml"]:
            self.say(errors=[], warnings=[])
        elif parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if asked["name"] == "theirs":
                self.answer(403)
            elif repo in self.server.repos:
                self.answer(409, json.dumps({"url": f"{self.server.url}/{repo}"}).encode())
            else:
                self.server.repos[repo] = {"main": {}}
                self.say(url=f"{self.server.url}/{repo}")
        elif (files := self.files("/".join(parts[2:4]), parts[5])) is None:
            pass
        elif parts[4] == "preupload":
            asked = json.loads(body)["files"]
            self.say(files=[{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked])
        else:
            assert parts[4] == "commit"
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.say(commitUrl=f"{self.server.url}/{'/'.join(parts[2:4])}/commit/1", commitOid="1")


@contextmanager
def on_loopback(cache: Path) -> Iterator[Hub]:
    """huggingface_hub asks this server within, and keeps what it fetches in the folder `cache`."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        template = server.url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        places = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        places |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}
        with patch.multiple(constants, **places), patch.dict(os.environ, NO_PROXY="127.0.0.1"):
            huggingface_hub.close_session()
            yield server
            server.shutdown()
    huggingface_hub.close_session()
