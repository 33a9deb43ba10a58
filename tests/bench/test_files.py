"""Damaged files: a part of the campaign with fixed seeds, and that it sees what readers must not do."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from bench.run_files import main
from bench.trust import reading
from bench.trust.damage import damaged
from bench.trust.files import KINDS, Kind
from bench.trust.reading import campaign


@pytest.fixture(autouse=True)
def _warm_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WARM", 20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_campaign(kind: str) -> None:
    tally = campaign(kind, 1, 0, 40)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.count == 40 and tally.results["refused"] > 10


def test_damage_comes_from_its_seed_and_is_some() -> None:
    data = bytes(range(200))
    for seed in range(300):
        assert damaged(Random(seed), data) == damaged(Random(seed), data) != data


def kind(read: Callable[[Path], Any]) -> Callable[[], Kind]:
    return lambda: Kind("x.bin", lambda path: path.write_bytes(pickle.dumps([1.5, "x" * 50])), read)


def runs_code(path: Path) -> None:
    if b"x" * 50 not in path.read_bytes():
        eval("1 + 1")
    raise ValueError(f"{path}: refused")


def takes_memory(path: Path) -> None:
    if b"x" * 50 not in path.read_bytes():
        np.ones(5 * 10**7)  # far more than a system may take away meanwhile of what a process does not use
    raise ValueError(f"{path}: refused")


def asks_for_memory(path: Path) -> None:
    if b"x" * 50 not in path.read_bytes():
        np.empty(2 * 10**8)
    raise ValueError(f"{path}: refused")


def takes_long(path: Path) -> None:
    began = time.process_time()
    while b"x" * 50 not in path.read_bytes() and time.process_time() - began < 0.2:
        continue
    raise ValueError(f"{path}: refused")


def names_nothing(path: Path) -> None:
    raise ValueError("refused" if b"x" * 50 not in path.read_bytes() else f"{path}: refused")


def trips(path: Path) -> None:
    if b"x" * 50 not in path.read_bytes():
        raise KeyError(f"{path}")
    raise ValueError(f"{path}: refused")


def dies(path: Path) -> None:
    if b"x" * 50 not in path.read_bytes():
        os.kill(os.getpid(), 9)
    raise ValueError(f"{path}: refused")


def writes(path: Path) -> None:
    if b"x" * 50 not in path.read_bytes():
        (path.parents[2] / "campaign-wrote-this").touch()
        (path.parents[2] / "campaign-wrote-this").unlink()
    raise ValueError(f"{path}: refused")


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (runs_code, "while it was read: compile"),
        (takes_memory, "bytes of memory"),
        (asks_for_memory, "MemoryError"),
        (takes_long, "0.2 s"),
        (names_nothing, "without its name: ValueError: refused"),
        (trips, "KeyError"),
        (dies, "the process ended with -9"),
        (writes, "campaign-wrote-this opened for writing"),
    ],
)
def test_what_a_reader_must_not_do_is_seen(
    read: Callable[[Path], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once_whole(path: Path, times: list[int] = []) -> Any:  # noqa: B006
        times.append(1)
        return "whole" if len(times) == 1 else read(path)

    monkeypatch.setitem(KINDS, "planted", kind(once_whole))
    monkeypatch.setattr(reading, "SECONDS", 0.15)
    monkeypatch.setattr(reading, "WARM", 0)
    tally = campaign("planted", 0, 0, 12)
    assert tally.count == 12 and tally.failures
    assert all(told in failure for failure in tally.failures), tally.failures


def test_the_command_writes_a_line_a_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["SmoothCache's", "job of a set"]
    assert main(["--count", "20", "--kind", *names, "--out", str(tmp_path / "f.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == names and all(line["count"] == 20 for line in lines)
    assert "20 read" in capsys.readouterr().out
