"""Shapes, compilations and threads that come and go: what stays behind of memory, plans and graphs."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

import harmonica_rt as hrt
from harmonica_rt.compiled import CompiledTransformer
from tests.conftest import Calls, make_dit
from tests.emulator import EmulatedGraph, Emulator

from .reading import status_bytes

STEPS = 4
SHAPES = [(batch, size) for batch in range(1, 13) for size in ((4, 4), (6, 6), (8, 8), (10, 10), (12, 12))]
KINDS = [(level, backend) for level in ("branches", "blocks") for backend in ("eager", "cudagraph")]
WARM = 0.2  # of the runs, before which memory may still grow
ROOM = 16 * 2**20  # resident bytes that may come and go after that


@dataclass
class Tally:
    """Of runs or cycles: a line of a results file.

    Attributes:
        resident: bytes of the process, in turn, the first once warm.
        plans, graphs, graph_bytes: alive then, likewise; `kept`: plans that may be.
        peak_plans: most that ever were.
    """

    what: str
    count: int
    shapes: int = 1
    threads: int = 0
    kept: int = 0
    peak_plans: int = 0
    resident: list[int] = field(default_factory=list)
    plans: list[int] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    graph_bytes: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """What grew is a failure."""
        grown = max(self.resident) - self.resident[0]
        if grown > ROOM:
            self.failures.append(f"{self.what}: {grown} bytes more resident than once warm, expected at most {ROOM}")
        if self.peak_plans > self.kept:
            self.failures.append(f"{self.what}: {self.peak_plans} plans alive, expected at most {self.kept}")
        if self.graphs[-1] > max(self.graphs[: len(self.graphs) // 2 + 1]):
            self.failures.append(f"{self.what}: graphs alive {self.graphs}, expected no more at the end")


class Census:
    """Plans and emulated graphs that are alive, by weak references."""

    def __init__(self) -> None:
        self.plans: weakref.WeakSet[Any] = weakref.WeakSet()
        self.graphs: weakref.WeakSet[EmulatedGraph] = weakref.WeakSet()

    def compiled(self, model: Any, schedule: hrt.Schedule, backend: str, **options: Any) -> CompiledTransformer:
        fast = hrt.compile(model, schedule, backend=backend, **options)
        graphs = self.graphs

        class Counted(Emulator):
            def capture(self, launch: Callable[[], Any]) -> tuple[EmulatedGraph, Any]:
                graph, output = super().capture(launch)
                graphs.add(graph)
                return graph, output

        fast._recorder = Counted
        return fast

    def see(self, *compiled: CompiledTransformer) -> None:
        for fast in compiled:
            self.plans.update(fast._plans.values())

    def tell(self, tally: Tally) -> None:
        gc.collect()
        storages = {t.untyped_storage().data_ptr(): t for graph in list(self.graphs) for t in graph.made.values()}
        tally.resident.append(status_bytes("VmRSS"))
        tally.plans.append(len(self.plans))
        tally.graphs.append(sum(bool(graph.ops) for graph in self.graphs))
        tally.graph_bytes.append(sum(t.untyped_storage().nbytes() for t in storages.values()))


def runs(count: int, seed: int = 0, tell: Callable[[str], None] = lambda message: None) -> Tally:
    """`count` runs over all `SHAPES`, each in a thread of its own, by turns of two levels, eager and captured."""
    rng, census = Random(seed), Census()
    tally = Tally(f"runs, {', '.join(map(' '.join, KINDS))}", count, len(SHAPES))
    models = [make_dit(2) for _ in KINDS]
    compiled = [
        census.compiled(model, hrt.Schedule.uniform(model, STEPS, 2, level=level), backend)
        for model, (level, backend) in zip(models, KINDS)
    ]
    tally.kept = 4 * len(compiled)
    eager = [fast for fast in compiled if fast.backend == "eager"]
    warm, errors = round(WARM * count), list[BaseException]()

    def once(fast: CompiledTransformer, batch: int, size: tuple[int, int], run: int) -> None:
        try:
            calls = Calls(STEPS, batch=batch, size=size, seed=run)
            with torch.no_grad():
                for step in range(STEPS if run % 7 else 2):  # now and then cut short
                    calls.call(fast, step)
        except BaseException as error:
            errors.append(error)

    done = 0
    while done < count:
        # Emulated captures are one at a time, as CUDA's are; eager runs go on beside one another
        turns = [eager, *([fast] for fast in compiled if fast not in eager)]
        for turn in turns:
            threads = []
            for fast in turn:
                threads.append(threading.Thread(target=once, args=(fast, *rng.choice(SHAPES), done)))
                done += 1
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            tally.threads += len(threads)
        census.see(*compiled)
        tally.peak_plans = max(tally.peak_plans, sum(len(fast._plans) for fast in compiled))
        if errors:
            tally.failures += [f"{type(error).__name__}: {error}" for error in errors]
            break
        if done >= warm and done % max(len(KINDS), count // 40 // len(KINDS) * len(KINDS)) == 0:
            census.tell(tally)
            tell(f"{done} runs: {tally.resident[-1] / 2**20:.1f} MiB resident, {tally.plans[-1]} plans")
    tally.count = done
    for fast in compiled:
        fast.uncompile()
    _nothing_left(census, tally)
    return tally


def cycles(count: int, backend: str, level: str = "branches", tell: Callable[[str], None] = lambda _: None) -> Tally:
    """`count` times compiled, run, and taken back."""
    census, model = Census(), make_dit(2)
    tally = Tally(f"cycles, {level} {backend}", count, kept=1)
    schedule = hrt.Schedule.uniform(model, STEPS, 2, level=level)
    for number in range(count):
        fast = census.compiled(model, schedule, backend)
        Calls(STEPS, seed=number).run(fast)
        census.see(fast)
        tally.peak_plans = max(tally.peak_plans, len(census.plans))
        assert fast.uncompile() is model
        del fast
        if number >= WARM * count:
            census.tell(tally)
        else:
            gc.collect()
        tell(f"cycle {number + 1} of {count}, {backend}")
    _nothing_left(census, tally)
    return tally


def _nothing_left(census: Census, tally: Tally) -> None:
    census.tell(tally)
    for what, count in (("plans", tally.plans[-1]), ("graphs", tally.graphs[-1])):
        if count:
            tally.failures.append(f"{tally.what}: {count} {what} alive once all was uncompiled, expected none")
    tally.judge()
