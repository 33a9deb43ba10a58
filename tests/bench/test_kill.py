"""Kills: a few of what the campaign does, and that it sees work which leaves half a file or ends elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench.run_kill import main
from bench.trust import works
from bench.trust.killing import Work, campaign
from harmonica_rt import shards


@pytest.mark.parametrize("name", ["save", "try"])
def test_a_part_of_the_campaign(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works.Saving, "TIMES", 10)
    tally = campaign(name, works.WORKS[name](), 2, 3)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.moments == 2 and tally.kills + tally.late >= 2


class Counting(Work):
    """Writes ten numbers, and goes on behind the last that is there."""

    def write(self, path: Path, text: str) -> None:
        shards.write(path, text.encode())

    def run(self, folder: Path) -> None:
        path = folder / "n.txt"
        for number in range(int(path.read_text()) + 1 if path.exists() else 0, 10):
            self.write(path, f"{number}".zfill(9))
            time.sleep(0.03)

    def check(self, folder: Path) -> list[str]:
        if not (folder / "n.txt").exists():
            return []
        if len(text := (folder / "n.txt").read_text()) != 9:
            raise ValueError(f"n.txt: {text!r}")
        return ["n.txt"]

    def result(self, folder: Path) -> Any:
        return (folder / "n.txt").read_text()


class InPlace(Counting):
    def write(self, path: Path, text: str) -> None:
        path.write_text("")
        time.sleep(0.1)
        path.write_text(text)


class Elsewhere(Counting):
    def run(self, folder: Path) -> None:
        again = (folder / "n.txt").exists()
        super().run(folder)
        if again:
            self.write(folder / "n.txt", "other one")


def test_what_is_whole_and_goes_on_passes() -> None:
    tally = campaign("counting", Counting(), 6, 0)
    assert not tally.failures and tally.kills >= 3 and tally.left["n.txt"] >= 2


def test_half_a_file_is_seen() -> None:
    tally = campaign("in place", InPlace(), 8, 0)
    assert any("n.txt: ''" in failure for failure in tally.failures), tally.failures


def test_another_result_is_seen() -> None:
    tally = campaign("elsewhere", Elsewhere(), 8, 0)
    assert any("another result" in failure for failure in tally.failures), tally.failures


def test_the_command_writes_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(works.WORKS, "save", Counting)
    assert main(["--moments", "1", "--work", "save", "--out", str(tmp_path / "k.jsonl")]) == 0
    assert '"work": "save"' in (tmp_path / "k.jsonl").read_text()
