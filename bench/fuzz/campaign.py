"""Chunks of cases, each on one model, and what became of them as a line of JSON."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.by_hand.module_reuse import MODULES

from .case import Case, script
from .drawing import draw
from .models import NAMES, NOT_AT_BRANCHES
from .playing import OracleFailed, Tally, Wrong, play
from .shrinking import failure_of, shrink
from .subject import Subject

LEVELS = ("branches", "blocks", "output")
BACKENDS = ("eager", "inductor", "cudagraph")
DTYPES = {"float32": 8, "float64": 2, "bfloat16": 1}  # how often
FEW = (  # classes that backend inductor compiles: a shape takes seconds
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel, text to video",
)


@dataclass
class Chunk:
    """
    Attributes:
        seconds: on the wall; cpu: of this process.
        refused: how often, by what for.
        failures: scripts, and of cases that fail only behind others of their chunk the case.
    """

    seed: int
    number: int
    level: str
    backend: str
    model: str
    dtype: str
    cases: int = 0
    runs: int = 0
    calls: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    cpu: float = 0.0
    commit: str = ""
    refused: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, tally: Tally) -> None:
        self.runs += tally.runs
        self.calls += tally.calls
        self.worst = max(self.worst, tally.worst)
        self.events += tally.events
        if tally.refused is not None:
            self.refused[tally.refused] += 1

    def line(self) -> dict[str, Any]:
        return asdict(self) | {"refused": dict(self.refused), "events": dict(self.events)}


def names_at(level: str) -> list[str]:
    """Models that have a level, unless their configuration is one that it refuses."""
    at_branches = [name for name in NAMES if name.split(",")[0] in MODULES and name not in NOT_AT_BRANCHES]
    return {
        "branches": at_branches,
        "blocks": [name for name in NAMES if "UNet" not in name],
        "output": list(NAMES),
    }[level]


def play_chunk(
    seed: int,
    number: int,
    level: str,
    backend: str,
    *,
    model: str | None = None,
    seconds: float = 4.0,
    cases: int = 10_000,
    shrinking: float = 60.0,
) -> Chunk | None:
    """Cases number 0, 1, ... of a chunk, until time or their number is up. None if the model cannot have the level.

    Args:
        model: one at random unless given.
        seconds: of the processor's time.
        shrinking: seconds for making a failing case smaller.
    """
    rng = random.Random(f"{seed} {number} {level} {backend}")
    chosen = rng.choice(FEW if backend == "inductor" else names_at(level)) if model is None else model
    dtype = "float32" if backend == "inductor" else rng.choices([*DTYPES], [*DTYPES.values()])[0]
    if dtype == "float64" and level == "branches":  # documented
        dtype = "float32"
    subject = Subject(chosen, dtype)
    if not subject.runs and dtype != "float32":
        dtype = "float32"
        subject = Subject(chosen, dtype)
    if level not in subject.levels or not subject.runs:
        return None
    chunk = Chunk(seed, number, level, backend, chosen, dtype)
    started, cpu = time.monotonic(), time.process_time()
    while chunk.cases < cases and time.process_time() - cpu < seconds:
        if subject.dirty:
            subject = Subject(chosen, dtype)
        chunk.cases += 1
        case = draw(rng, subject, level, backend)
        try:
            chunk.add(play(case, subject))
            if not subject.dirty:
                subject.restore()
        except (Wrong, OracleFailed) as error:
            chunk.failures.append(explained(case, error, shrinking))
            subject.dirty = True
    chunk.seconds, chunk.cpu = time.monotonic() - started, time.process_time() - cpu
    return chunk


def explained(case: Case, error: Exception, seconds: float) -> str:
    """The script of a failure."""
    if isinstance(error, OracleFailed):
        return script(case, f"the oracle failed: {error}")
    if (alone := failure_of(case)) is None:
        return script(case, f"fails only behind other cases of its chunk: {error}")
    return script(*shrink(case, alone, seconds))
