"""Work killed at random moments: whatever is left is whole, and going on gives what it would have given."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

AGAIN = 0.3  # how often what goes on is killed, too
LIMIT = 600.0  # seconds that work may take


class Work(ABC):
    """Something a user starts, that leaves files in a folder.

    Attributes:
        children: whether it starts processes, which are killed with it at every second moment.
    """

    children = False

    def prepare(self, place: Path) -> None:
        """Once, what all runs read."""
        self.place = place

    @abstractmethod
    def run(self, folder: Path) -> None:
        """All of it, or what is left of it."""

    @abstractmethod
    def check(self, folder: Path) -> list[str]:
        """Names of the files that are there and whole. Raises where one is not, or would be read as what it is not."""

    @abstractmethod
    def result(self, folder: Path) -> Any:
        """What must be the same, killed or not."""


@dataclass
class Tally:
    """Of one kind of work: a line of a results file.

    Attributes:
        seconds: of the work, undisturbed.
        kills: how many came in time; late: how many came once it had ended.
        left: how often a file was there, and whole, after a kill.
        drafts: most files left behind under a name that nothing reads.
    """

    work: str
    seed: int
    moments: int = 0
    seconds: float = 0.0
    kills: int = 0
    late: int = 0
    left: dict[str, int] = field(default_factory=dict)
    drafts: int = 0
    failures: list[str] = field(default_factory=list)


def campaign(
    name: str, work: Work, moments: int, seed: int, tell: Callable[[str], None] = lambda message: None
) -> Tally:
    """`moments` runs of `work`, each killed once or more and then finished."""
    tally = Tally(name, seed)
    with TemporaryDirectory() as place:
        work.prepare(Path(place))
        whole = Path(place) / "whole"
        began = time.monotonic()
        _finish(work, whole)
        tally.seconds = time.monotonic() - began
        work.check(whole)
        expected = work.result(whole)
        for number in range(moments):
            tally.moments += 1
            folder = Path(place) / f"killed-{number}"
            try:
                _one(work, folder, Random(f"{seed} {name} {number}"), tally, number % 2 == 1 and work.children)
                if work.result(folder) != expected:
                    raise ValueError("another result than without a kill")
            except Exception as error:  # whatever checking or going on says is a finding
                tally.failures.append(f"{name}, seed {seed}, moment {number}: {type(error).__name__}: {error}")
            tell(f"{name}: {number + 1} of {moments}, {tally.kills} killed, {len(tally.failures)} failures")
    return tally


def _one(work: Work, folder: Path, rng: Random, tally: Tally, children: bool) -> None:
    while True:
        # Every second one where it ends: that is when most files are written
        begin, end = rng.choice(((0.0, 1.0), (0.8, 1.1)))
        if _killed(work, folder, rng.uniform(begin, end) * tally.seconds, children):
            tally.kills += 1
        else:
            tally.late += 1
        left = work.check(folder)
        for name in left:
            tally.left[name] = tally.left.get(name, 0) + 1
        tally.drafts = max(tally.drafts, len(list(folder.rglob(".*.tmp"))))
        if rng.random() >= AGAIN:
            break
    _finish(work, folder)
    work.check(folder)


def _start(work: Work, folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    if (child := os.fork()) == 0:
        os.setsid()
        code = 1
        try:
            with open(folder.with_suffix(".log"), "a") as log:
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            work.run(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return child


def _killed(work: Work, folder: Path, after: float, children: bool) -> bool:
    """Whether it was still at work `after` seconds, when it was killed."""
    child = _start(work, folder)
    time.sleep(after)
    (os.killpg if children else os.kill)(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"it failed: {_said(folder)}")
    return code != 0


def _finish(work: Work, folder: Path) -> None:
    child, until = _start(work, folder), time.monotonic() + LIMIT
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise RuntimeError(f"not finished after {LIMIT:g} s")
        time.sleep(0.02)
    if code := os.waitstatus_to_exitcode(done[1]):
        raise RuntimeError(f"going on ended with {code}: {_said(folder)}")


def _said(folder: Path) -> str:
    text = folder.with_suffix(".log").read_text(errors="replace")
    return re.sub(r"\s+", " ", text)[-600:]
