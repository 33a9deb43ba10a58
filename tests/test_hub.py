"""Schedules to and from the Hub: a small server on loopback speaks what huggingface_hub asks of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from harmonica_rt import Schedule, hub

from .conftest import make_dit, random_schedule
from .hub_server import Hub, on_loopback
from .test_channels import random_channels

MINE = random_schedule(0, learned=True).replace(sampler="DDIMScheduler", guidance_scale=1.5, note="2x | <b>\nlearned")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with on_loopback(tmp_path / "cache") as server:
        yield server


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


def test_a_damaged_cache_and_a_broken_answer_are_named(server: Hub, tmp_path: Path) -> None:
    MINE.push_to_hub("me/schedules")
    Schedule.from_hub("me/schedules", "schedule.json")
    server.claimed["schedule.json"] = 9  # the rest of the body is no answer to the next question
    server.repos["me/schedules"]["main"]["schedule.json"] += b" "
    with pytest.raises(ValueError, match=r"^me/schedules/schedule\.json: not a schedule file"):
        Schedule.from_hub("me/schedules", "schedule.json")
    with pytest.raises(ConnectionError, match=r"^me/schedules: expected a whole answer about other\.json, got "):
        Schedule.from_hub("me/schedules", "other.json")
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        huggingface_hub.close_session()
        (ref,) = (tmp_path / "cache").rglob("refs/main")
        ref.write_bytes(b"\xff")
        with pytest.raises(ValueError, match=r"^me/schedules: expected names of commits in the cache of the Hub, got"):
            Schedule.from_hub("me/schedules", "schedule.json")


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
