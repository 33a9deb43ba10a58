"""Damaged files read in a process of their own, watched: what comes of it, time, memory, and whether code ran."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from threading import get_ident
from typing import Any

import torch

from harmonica_rt.peak_memory import STATUS, PeakMemory

from .files import KINDS, Kind, is_valid

SECONDS, MEMORY = 1.0, 64 * 2**20  # of the processor, and resident bytes beyond those before: what a read may take
ADDRESSES = 2**30  # bytes more that the process may ask for, so that what is asked for and left alone shows
STUCK = 60.0  # seconds without an answer
WARM = 100  # reads before any is watched: they import what reading and refusing needs
RUNS = ("exec", "compile", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen")
RUNS += ("marshal.loads", "marshal.load", "pickle.find_class", "ctypes.dlopen", "socket.bind", "socket.connect")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Outcome:
    """Of one damaged file.

    Attributes:
        result: "as whole", "valid" (another schedule than the one that was saved), "refused", or "failed".
        told: type of the error, or what failed.
    """

    number: int
    result: str
    told: str
    seconds: float
    memory: int


@dataclass
class Tally:
    """Of a kind of file; `line` is what a results file has of it."""

    kind: str
    seed: int
    first: int
    bytes: int = 0
    count: int = 0
    seconds: float = 0.0
    memory: int = 0
    results: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.count += 1
        self.results[outcome.result] += 1
        self.seconds, self.memory = max(self.seconds, outcome.seconds), max(self.memory, outcome.memory)
        if outcome.result == "refused":
            self.refused[outcome.told] += 1
        if outcome.result == "failed":
            self.failures.append(f"{self.kind}, seed {self.seed}, number {outcome.number}: {outcome.told}")

    def line(self) -> dict[str, Any]:
        return asdict(self) | {"results": dict(self.results), "refused": dict(self.refused)}


def campaign(kind: str, seed: int, first: int, count: int) -> Tally:
    """Files number `first` on of a kind read; each comes from seed, kind and its number alone."""
    tally, number = Tally(kind, seed, first), first
    while number < first + count:
        number = _in_a_process(tally, number, first + count)
    return tally


def _in_a_process(tally: Tally, number: int, end: int) -> int:
    """Those from `number` on until all are read or one ends the process or gets stuck; the next one's number."""
    here, there = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_read_all, args=(tally.kind, tally.seed, number, end, there))
    process.start()
    there.close()
    begun = False
    try:
        while number < end:
            if not here.poll(STUCK):
                tally.add(Outcome(number, "failed", f"no answer for {STUCK:g} s", STUCK, 0))
                return number + 1
            outcome = here.recv()
            if isinstance(outcome, int):
                tally.bytes, begun = outcome, True
                continue
            tally.add(outcome)
            number += 1
    except EOFError:
        process.join()
        if not begun:
            raise RuntimeError(f"{tally.kind}: no whole file could be made or read") from None
        tally.add(Outcome(number, "failed", f"the process ended with {process.exitcode}", 0.0, 0))
        return number + 1
    finally:
        process.kill()
        process.join()
        here.close()
    return number


def _read_all(name: str, seed: int, first: int, end: int, answers: Connection) -> None:
    kind = KINDS[name]()
    with TemporaryDirectory() as place:
        folder = Path(place).resolve()
        (folder / "files").mkdir()
        with kind.prepared(folder / "files"):
            whole = kind.read()
            answers.send(kind.size)
            for number in range(WARM):
                kind.damage(Random(f"warm {number}"))
                try:
                    kind.read()
                except Exception:  # it is the same reading that is watched below
                    continue
            watch, memory = Watch(folder, kind.network), PeakMemory(torch.device("cpu"))
            resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + ADDRESSES, resource.RLIM_INFINITY))
            before = status_bytes("VmRSS")
            for number in range(first, end):
                kind.damage(Random(f"{seed} {name} {number}"))
                answers.send(_outcome(kind, number, whole, folder, watch, memory, before))
    os._exit(0)


def _outcome(
    kind: Kind, number: int, whole: Any, folder: Path, watch: Watch, memory: PeakMemory, before: int
) -> Outcome:
    memory.start()
    watch.seen.clear()
    watch.on, began = True, time.process_time()
    value, error = None, None
    try:
        value = kind.read()
    except BaseException as caught:  # whatever is not documented is a finding
        error = caught
    finally:
        watch.on = False
    seconds, peak = time.process_time() - began, memory.bytes()
    took = 0 if peak is None else max(0, peak - before)
    result, told = _judged(kind, value, error, whole, folder)
    for wrong, what in (
        (bool(watch.seen), f"while it was read: {', '.join(watch.seen[:3])}"),
        (seconds > SECONDS, f"{seconds:.1f} s"),
        (took > MEMORY, f"{took} bytes of memory"),
    ):
        if wrong:
            result, told = "failed", f"{told}; {what}"
    return Outcome(number, result, told, seconds, took)


def _judged(kind: Kind, value: Any, error: BaseException | None, whole: Any, folder: Path) -> tuple[str, str]:
    if error is None:
        if value == whole:
            return "as whole", ""
        return ("valid", "") if is_valid(value, folder) else ("failed", "what was read is no whole schedule")
    told = f"{type(error).__name__}: {str(error)[:300]}"
    if not isinstance(error, (ValueError, OSError)):
        return "failed", told
    return ("refused", type(error).__name__) if kind.named in str(error) else ("failed", f"without its name: {told}")


class Watch:
    """What Python itself tells of code run and files written (PEP 578), while `on`.

    Args:
        folder: within, files may be written.
        network: whether loopback may be connected to.
    """

    def __init__(self, folder: Path, network: bool) -> None:
        self.folder, self.network, self.on, self.seen = folder, network, False, list[str]()
        self.thread = get_ident()  # the Hub on loopback has others
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or get_ident() != self.thread or not (event in RUNS or event == "open"):
            return
        self.on = False  # looking opens files, too
        try:
            if event == "open":
                path, _, flags = args
                if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & WRITES:
                    at = Path(os.fsdecode(path)).resolve()
                    if not at.is_relative_to(self.folder) and str(at) != os.devnull:
                        self.seen.append(f"{at} opened for writing")
            elif event == "socket.connect" and self.network and args[1][0] == "127.0.0.1":
                return
            elif not _imports():
                self.seen.append(f"{event} {str(args)[:200]}")
        finally:
            self.on = True


def _imports() -> bool:
    """Whether it is Python's own import that runs a module, one that is installed: errors may need it."""
    frame = sys._getframe(2)
    return frame.f_code.co_filename.startswith("<frozen importlib")


def status_bytes(name: str) -> int:
    """Of this process, as proc(5) has it: VmRSS is what is resident."""
    match = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert match, "proc(5): a process has one"
    return 1024 * int(match[1])
