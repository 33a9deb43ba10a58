"""Lines on disk as soon as a figure exists, cases that fail alone, a budget of seconds.

A file of JSON lines is one run on one card. Each line names its `kind`, `stage`, `case` and seconds since the start:

    start    the card, the arguments, the budget
    begin    a case begins
    trying   a candidate of a case begins: if the process dies before `tried`, this is what it died of
    tried    and how many seconds it took
    figure   something was measured or found
    failed   an exception with its traceback, of a candidate or of the whole case
    skipped  a case or candidate that was not run, and why
    done     the case is over
    end      the run is over, and how
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .machine import Machine

T = TypeVar("T")
# Parts of the budget. What a stage leaves over goes to the next; what it would take from later stages it does not get.
SHARES = {
    "environment": 0.05, "correct": 0.15, "levels": 0.25, "learning": 0.15, "capture": 0.05, "latency": 0.25,
    "gap": 0.05, "profile": 0.05,
}  # fmt: skip
STAGES = tuple(SHARES)
LEAST = 90.0  # seconds a case may take whatever was expected of it, where there is a budget
OVERRUN = 4.0  # times the expected seconds


class Stopped(BaseException):
    """SIGTERM. Not an Exception: compilers and libraries must not catch it."""


class TookTooLong(BaseException):
    """A case is over its limit."""


class DeviceLost(BaseException):
    """The device refuses all work after an error: only a new process can go on."""


@dataclass(frozen=True)
class Case:
    """One thing to run.

    Attributes:
        name: unique in its stage.
        seconds: expected on an H100, compilation included.
        run: writes figures to the log it is given.
        keeps: what it leaves in memory, compiled code too, is the next case's.
    """

    stage: str
    name: str
    seconds: float
    run: Callable[[Log], None]
    keeps: bool = False


class Record:
    """The lines of one run.

    Args:
        path: is made, unless it exists: then the run in it goes on, its cases over are not run again, and a candidate
            it died of is skipped from now on.
        budget: seconds from the first start; None for no limit.
        stages: those that are to run, which decides what is kept back for later ones.
        pace: how long this machine takes, relative to an H100.
    """

    def __init__(
        self,
        path: Path,
        machine: Machine,
        *,
        budget: float | None = None,
        stages: Sequence[str] = STAGES,
        pace: float = 1.0,
        **start: Any,
    ) -> None:
        self.path, self.machine, self.budget, self.pace = path, machine, budget, pace
        self.stages = [stage for stage in STAGES if stage in stages]
        self.began = time.time()
        self.over: set[tuple[str, str]] = set()
        self.deadly: set[tuple[str, str]] = set()  # stage and candidate
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = read(path) if text else []
        self.file = path.open("a", encoding="utf-8")
        if not text.endswith("\n") and text:
            self.file.write("\n")  # behind a line that was cut off
        if lines:
            self._go_on(lines)
        else:
            self.write("start", machine=machine.name, budget=budget, stages=self.stages, began=self.began, **start)

    def _go_on(self, lines: list[dict[str, Any]]) -> None:
        self.began, case, trying = lines[0]["began"], None, None
        for line in lines:
            kind = line["kind"]
            if kind in ("begin", "trying"):
                case, trying = (line, None) if kind == "begin" else (case, line)
            elif "name" in line:
                trying = None
                if line.get("fatal"):
                    self.deadly.add((line["stage"], line["name"]))
                    case = None  # it can be run again, without this one
            elif kind in ("done", "skipped", "failed"):
                self.over.add((line["stage"], line["case"]))
                case = None
        if case is None:
            return
        died = {"stage": case["stage"], "case": case["case"], "error": "the process died"}
        if trying is None:
            self.over.add((case["stage"], case["case"]))
            self.write("failed", **died)
        else:
            self.deadly.add((case["stage"], trying["name"]))
            self.write("failed", **died, name=trying["name"], fatal=True)

    def write(self, kind: str, **figures: Any) -> None:
        """A line, on disk when this returns."""
        line = {"kind": kind, "at": round(time.time() - self.began, 3), **figures}
        self.file.write(json.dumps(line, default=str) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def left(self, stage: str) -> float:
        """Seconds that a case of `stage` may still take."""
        if self.budget is None:
            return float("inf")
        later = self.stages[self.stages.index(stage) + 1 :] if stage in self.stages else []
        total = sum(SHARES[name] for name in self.stages)
        kept = self.budget * sum(SHARES[name] for name in later) / total
        return self.budget - (time.time() - self.began) - kept

    def run(self, cases: Sequence[Case], say: Callable[[str], None] = print) -> None:
        """Run what fits; an exception ends its own case."""
        for n, case in enumerate(cases):
            if n and case.stage != cases[n - 1].stage:
                self.machine.forget()  # whatever was kept for a case that was skipped
            if (case.stage, case.name) in self.over:
                continue
            log, left, expected = Log(self, case, say), self.left(case.stage), self.pace * case.seconds
            if expected > left:
                log.skipped(reason=f"expected to take {expected:.0f} s, {max(0.0, left):.0f} s of the budget are left")
                continue
            began = time.perf_counter()
            say(f"{case.stage}: {case.name}")
            log.write("begin")
            try:
                with _limit(left if self.budget is None else min(left, max(LEAST, OVERRUN * expected))):
                    case.run(log)
            except TookTooLong as error:
                log.failed(error)
            except Exception as error:
                lost = not self.machine.usable()
                log.failed(error, device_lost=lost)
                if lost:
                    raise DeviceLost from error
            else:
                log.write("done", seconds=time.perf_counter() - began)
            if not case.keeps:
                self.machine.forget()


class Log:
    """Writes a case's lines."""

    def __init__(self, record: Record, case: Case, say: Callable[[str], None]) -> None:
        self.record, self.case, self.say = record, case, say

    def write(self, kind: str, **figures: Any) -> None:
        self.record.write(kind, stage=self.case.stage, case=self.case.name, **figures)

    def figure(self, **figures: Any) -> None:
        self.write("figure", **figures)

    def skipped(self, **about: Any) -> None:
        self.say(f"  skipped: {about['reason']}")
        self.write("skipped", **about)

    def failed(self, error: BaseException, **about: Any) -> None:
        self.say(f"  failed: {type(error).__name__}: {str(error).strip()[:300]}")
        text = f"{type(error).__name__}: {error}"
        self.write("failed", error=text[:2000], traceback=_traceback(error), **about)

    def attempt(self, name: str, run: Callable[[], T]) -> T | None:
        """`run`'s result, or None if it raised or killed an earlier process: a candidate fails on its own.

        Raises:
            DeviceLost: what it did cannot be undone in this process.
        """
        if (self.case.stage, name) in self.record.deadly:
            self.skipped(name=name, reason="an earlier process died of it")
            return None
        self.write("trying", name=name)
        began = time.perf_counter()
        try:
            result = run()
            self.record.machine.synchronize()  # what was launched fails here, and not in the next candidate
        except Exception as error:
            lost = not self.record.machine.usable()
            self.failed(error, name=name, fatal=lost)
            if lost:
                raise DeviceLost from error
            return None
        self.write("tried", name=name, seconds=time.perf_counter() - began)
        return result


def _traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    return text if len(text) <= 12000 else f"{text[:4000]}\n...\n{text[-8000:]}"


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the main thread when so many are over."""

    def over(*_: Any) -> None:
        raise TookTooLong(f"took more than {seconds:.0f} s")

    if seconds == float("inf"):
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(path: Path) -> list[dict[str, Any]]:
    """A run's lines; one that was cut off while it was written is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
