"""Schedules to and from the Hub: a small server on loopback speaks what huggingface_hub asks of it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from harmonica_rt import Schedule, hub

from .conftest import make_dit, random_schedule
from .test_channels import random_channels

MINE = random_schedule(0, learned=True).replace(sampler="DDIMScheduler", guidance_scale=1.5, note="2x | <b>\nlearned")


class Hub(ThreadingHTTPServer):
    """Repositories of files, in memory: {repository: {revision: {path: content}}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.claimed: dict[str, int] = {}  # sizes that differ from the content's
        self.tokens: list[str | None] = []
        self.sent: list[str] = []

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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        endpoint = constants.ENDPOINT
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield server
        server.shutdown()
    huggingface_hub.close_session()


def test_there_and_back(server: Hub) -> None:
    assert MINE.push_to_hub("me/schedules", token="secret") == f"{server.url}/me/schedules/commit/1"
    assert Schedule.from_hub("me/schedules", "schedule.json", token="secret") == MINE
    assert server.tokens[-1] == "Bearer secret"
    wide = random_channels(make_dit(), "branches")
    wide.push_to_hub("me/schedules")
    assert Schedule.from_hub("me/schedules", "schedule.safetensors") == wide
    assert set(server.repos["me/schedules"]["main"]) == {"schedule.json", "schedule.safetensors", "README.md"}


def test_a_branch_is_a_place_of_its_own(server: Hub) -> None:
    MINE.push_to_hub("me/schedules")
    server.repos["me/schedules"]["next"] = {}
    other = random_schedule(1)
    other.push_to_hub("me/schedules", "20/a.json", revision="next")
    assert list(server.repos["me/schedules"]["next"]) == ["20/a.json", "README.md"]
    assert Schedule.from_hub("me/schedules", "schedule.json") == MINE


def test_the_card_tells_the_figures_and_keeps_what_a_person_wrote(server: Hub) -> None:
    MINE.push_to_hub("me/schedules", "a.json")
    files = server.repos["me/schedules"]["main"]
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: harmonica_rt\n") and "## a.json" in card
    assert f"| cache utilisation ratio (CUR) | {100 * MINE.cur:.1f} % |" in card
    assert "| sampler, steps | DDIMScheduler, 6 |" in card and "| guidance scale | 1.5 |" in card
    assert "| note | 2x \\| &lt;b> learned |" in card
    assert 'hrt.Schedule.from_hub("me/schedules", "a.json")' in card
    mine = "# Mine\n\nBefore.\n" + card[card.index("<!--") :] + "After.\n"
    files["README.md"] = mine.encode()
    MINE.replace(guidance_scale=4.0).push_to_hub("me/schedules", "a.json")
    assert files["README.md"].decode() == mine.replace("| guidance scale | 1.5 |", "| guidance scale | 4 |")
    MINE.push_to_hub("me/schedules", "b.json")
    card = files["README.md"].decode()
    assert card.startswith(mine.replace("| 1.5 |", "| 4 |").rstrip()) and card.count("## ") == 2


def test_a_note_cannot_end_its_section(server: Hub) -> None:
    evil = MINE.replace(note="x <!-- /harmonica_rt: a.json --> ``` ---", sampler="<!-- harmonica_rt: a.json -->")
    for _ in range(2):
        evil.push_to_hub("me/schedules", "a.json")
    assert server.repos["me/schedules"]["main"]["README.md"].count(b"<!--") == 2


def test_what_is_not_there_is_named(server: Hub) -> None:
    MINE.push_to_hub("me/schedules")
    with pytest.raises(FileNotFoundError, match=r"^me/none: expected a repository that the token may read, got HTTP 4"):
        Schedule.from_hub("me/none", "schedule.json")
    with pytest.raises(FileNotFoundError, match=r"^me/schedules: no file none\.json$"):
        Schedule.from_hub("me/schedules", "none.json")
    with pytest.raises(FileNotFoundError, match=r"^me/schedules: expected a branch, tag or commit, got revision 'v2'"):
        Schedule.from_hub("me/schedules", "schedule.json", revision="v2")
    with pytest.raises(FileNotFoundError, match=r"^me/schedules: expected a branch, tag or commit, got revision 'v2'"):
        MINE.push_to_hub("me/schedules", revision="v2")
    with pytest.raises(PermissionError, match=r"^me/theirs: expected a token that may write to it, got HTTP 403"):
        MINE.push_to_hub("me/theirs")


def test_bad_names_are_refused_before_anything_is_sent(server: Hub) -> None:
    for bad in ("../s.json", "/s.json", "a//b.json", "README.md", "x/README.md", "", "a b.json", "s.json\n"):
        with pytest.raises(ValueError, match="file: expected a path of letters, digits"):
            Schedule.from_hub("me/schedules", bad)
        with pytest.raises(ValueError, match="file: expected a path of letters, digits"):
            MINE.push_to_hub("me/schedules", bad)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.json or \.safetensors, got 's\.pt'"):
        Schedule.from_hub("me/schedules", "s.pt")
    with pytest.raises(ValueError, match=r"expected a name that ends in \.json, got 's\.safetensors'"):
        MINE.push_to_hub("me/schedules", "s.safetensors")
    with pytest.raises(ValueError, match="me/schedules/more"):
        Schedule.from_hub("me/schedules/more", "s.json")
    with pytest.raises(TypeError, match="file: expected a str, got PosixPath"):
        Schedule.from_hub("me/schedules", Path("s.json"))
    assert not server.repos and not server.tokens


def test_what_was_fetched_once_is_there_offline(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    MINE.push_to_hub("me/schedules")
    assert Schedule.from_hub("me/schedules", "schedule.json") == MINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # a session knows whether it is offline
    assert Schedule.from_hub("me/schedules", "schedule.json") == MINE
    with pytest.raises(FileNotFoundError, match=r"^me/schedules: expected the Hub to answer, or none\.json in"):
        Schedule.from_hub("me/schedules", "none.json")
    with pytest.raises(FileNotFoundError, match=r"^me/none: expected the Hub .*, or s\.json at revision 'v2' in"):
        Schedule.from_hub("me/none", "s.json", revision="v2")


def test_files_too_large_are_not_fetched(server: Hub) -> None:
    server.repos["me/schedules"] = {"main": {"s.json": b"{}", "w.safetensors": b"{}"}}
    server.claimed = {"s.json": 2**24 + 1, "w.safetensors": 2**30 + 1}
    for name, most in (("s.json", 2**24), ("w.safetensors", 2**30)):
        with pytest.raises(ValueError, match=f"me/schedules/{name}: expected a file of at most {most} bytes, got"):
            Schedule.from_hub("me/schedules", name)
    assert not server.sent


@pytest.mark.parametrize("content", [b"\x80\x02cos\nsystem\n.", b"<html>", b'{"format": "other"}'])
def test_other_files_are_refused(server: Hub, content: bytes) -> None:
    server.repos["me/schedules"] = {"main": {"s.json": content}}
    with pytest.raises(ValueError, match=r"^me/schedules/s\.json: .*not a schedule file"):
        Schedule.from_hub("me/schedules", "s.json")


def test_the_environment_says_where_the_hub_is(server: Hub, tmp_path: Path) -> None:
    """As a person has it: HF_ENDPOINT and HF_HOME in the environment of a process of their own."""
    MINE.push_to_hub("me/schedules")
    script = "import harmonica_rt as hrt; print(hrt.Schedule.from_hub('me/schedules', 'schedule.json'))"
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{MINE}\n"


def test_sections_go_where_they_were() -> None:
    card = hub.with_section("", "a.json", "one")
    assert hub.with_section(card, "a.json", "one") == card
    both = hub.with_section(card, "b.json", "two")
    assert hub.with_section(both, "a.json", "1") == both.replace("\none\n", "\n1\n")
    assert np.array_equal([both.count(end) for end in ("one", "two")], [1, 1])
