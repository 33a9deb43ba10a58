"""Whole runs by every candidate, in interleaved rounds: device time, wall time, memory, compile and capture seconds.

Speed-up is against diffusers in eager mode; `realised` is speed-up over theory (MACs), and `realised_over_compile` the
same against the best compiled full run of the case. Ratios are medians over rounds of device time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse
from bench.measure.latency import COMPILED, EAGER, GATE, NAIVE, WrongResult
from bench.measure.timing import interleave
from bench.models.pipelines import PixelPipeline
from bench.peers import taylorseer
from harmonica_rt.measuring import Timing, ratio

from .machine import Machine
from .record import Case, Log
from .workload import Size, Workload, relative_error

STAGE = "latency"
OVERHEAD = "torch.compile, reduce-overhead"
FULL_RUNS = (EAGER, COMPILED, OVERHEAD)  # what computes everything, and is the same with every schedule
TAYLORSEER, TRAJECTORY = "TaylorSeer (diffusers)", "harmonica_rt, trajectory"
OURS = {f"harmonica_rt, {backend}": backend for backend in ("cudagraph", "eager", "inductor")}
NAMES = (EAGER, *OURS, TRAJECTORY, COMPILED, OVERHEAD, NAIVE, TAYLORSEER)  # ours before what compiles for a minute
XL256, XL512 = Size("DiT-XL/2 256", "dit-xl-2"), Size("DiT-XL/2 512", "dit-xl-2", side=64)
SIGMA = Size("PixArt-Sigma 1024", "pixart-sigma-1024")
# Size, batch, schedules, seconds for the first of them and for each other: compiled full runs are made once
FULL = (
    (XL256, 1, ("uniform:2", "uniform:3", "full"), 100, 18),
    (SIGMA, 1, ("uniform:2", "uniform:3", "full"), 140, 40),
    (XL256, 8, ("uniform:2", "uniform:3", "full"), 110, 30),
    (XL512, 1, ("uniform:2", "uniform:3", "full"), 110, 25),
    (XL256, 32, ("uniform:2", "uniform:3", "full"), 140, 60),
    (XL512, 8, ("uniform:2", "uniform:3", "full"), 150, 70),
    (SIGMA, 4, ("uniform:2", "uniform:3", "full"), 180, 90),
)
DRY = (
    (Size("DiT, 1 layer", "dit-s-2", layers=1, side=4), 1, ("uniform:2", "full"), 60, 10),
    (Size("PixArt, 1 layer", "pixart-alpha-256", layers=1, side=4), 1, ("uniform:2",), 60, 10),
)


@dataclass
class Bench:
    """What cases of one workload share."""

    work: Workload
    full: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)


def cases(machine: Machine, rounds: int = 7, steps: int = 20, without: Collection[str] = ()) -> list[Case]:
    """Those `without` some candidates, by name."""
    found = []
    for size, batch, schedules, first, others in DRY if machine.dry else FULL:
        for text in schedules:
            name = f"{size.name}, batch {batch}, {text}"
            seconds = first if text == schedules[0] else others
            run = partial(on_one_bench, machine, size, batch, steps, text, rounds, without)
            found.append(Case(STAGE, name, seconds, run, keeps=text != schedules[-1]))
    return found


def on_one_bench(
    machine: Machine, size: Size, batch: int, steps: int, text: str, rounds: int, without: Collection[str], log: Log
) -> None:
    bench = machine.kept
    if not isinstance(bench, Bench) or (bench.work.size, bench.work.batch) != (size, batch):
        del bench
        machine.forget()
        dtype = torch.float32 if machine.dry else torch.bfloat16
        bench = machine.kept = Bench(Workload(machine, size, batch, dtype, steps))
    with machine.graphs():
        measure(machine, bench, text, rounds, without, log)


def measure(machine: Machine, bench: Bench, text: str, rounds: int, without: Collection[str], log: Log) -> None:
    work = bench.work
    schedule = work.schedule(text)
    theory = work.theory(schedule)
    log.figure(
        size=work.size.name,
        batch=work.batch,
        schedule=text,
        steps=work.steps,
        dtype=str(work.dtype).removeprefix("torch."),
        guidance=work.guidance,
        sampler=type(work.pipeline.scheduler).__name__,
        cur=schedule.cur,
        theory=theory,
        tf32={"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        cudnn_benchmark=torch.backends.cudnn.benchmark,
    )
    made = Candidates(machine, bench, schedule, log)
    runs: dict[str, Callable[[], Tensor]] = {}
    try:
        for name in NAMES:
            if name in without or name in bench.broken or (name == TAYLORSEER and text == "full"):
                continue
            if name in bench.full:
                runs[name] = bench.full[name]
                continue
            run = log.attempt(name, partial(made.prepare, name))
            if run is not None:
                runs[name] = run
                if name in FULL_RUNS:
                    bench.full[name] = run
            elif name in FULL_RUNS:
                bench.broken.add(name)
        device, wall = timed(machine, runs, rounds, log)
        best = min((n for n in (COMPILED, OVERHEAD) if n in device), key=lambda n: device[n].median, default=None)
        for name in device:
            log.figure(name=name, **row(name, device, wall, theory, best, work), **bench.figures[name])
    finally:
        made.close()


def timed(
    machine: Machine, runs: dict[str, Callable[[], Tensor]], rounds: int, log: Log
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Device and wall time. A candidate that raises in its rounds leaves them; the others go on."""
    device: dict[str, list[float]] = {name: [] for name in runs}
    failed: set[str] = set()

    def unless_failed(name: str, clocked: Callable[[], None]) -> None:
        if name in failed:
            return
        try:
            clocked()
        except Exception as error:
            if not machine.usable():
                raise
            failed.add(name)
            log.failed(error, name=name)

    clocked = {name: partial(unless_failed, name, machine.clocked(run, device[name])) for name, run in runs.items()}
    wall = interleave(clocked, rounds)
    whole = [name for name in runs if name not in failed]
    return {name: Timing(tuple(device[name][-rounds:])) for name in whole}, {name: wall[name] for name in whole}


def row(
    name: str,
    device: dict[str, Timing],
    wall: dict[str, Timing],
    theory: float,
    best: str | None,
    work: Workload,
) -> dict[str, Any]:
    timing, reuses = device[name], name not in FULL_RUNS
    speedup = ratio(device[EAGER], timing) if EAGER in device else None
    over = ratio(device[best], timing) if best is not None else None
    return {
        "device_ms": 1e3 * timing.median,
        "device_ms_p20": 1e3 * timing.percentile(20),
        "device_ms_p80": 1e3 * timing.percentile(80),
        "wall_ms": 1e3 * wall[name].median,
        "wall_ms_p20": 1e3 * wall[name].percentile(20),
        "wall_ms_p80": 1e3 * wall[name].percentile(80),
        "ms_per_image": 1e3 * timing.median / work.batch,
        "speedup": speedup,
        "speedup_over_compile": over,
        "best_compiled": best,
        "realised": speedup / theory if reuses and speedup else None,
        "realised_over_compile": over / theory if reuses and over else None,
        "seconds": list(timing.seconds),
    }


class Candidates:
    """Makes the candidates of one schedule: callables that start a whole run and return its latents."""

    def __init__(self, machine: Machine, bench: Bench, schedule: hrt.Schedule, log: Log) -> None:
        self.machine, self.bench, self.work, self.schedule, self.log = machine, bench, bench.work, schedule, log
        self.expected: Tensor | None = None  # by reuse at module level
        self.made: dict[str, PixelPipeline] = {}  # by backend

    def close(self) -> None:
        for fast in self.made.values():
            hrt.uncompile(fast)
        self.made.clear()

    def prepare(self, name: str) -> Callable[[], Tensor]:
        """The candidate, run twice and checked; what that took and told is kept for its row."""
        before = self.machine.memory()
        started = time.perf_counter()
        run, more = self._make(name)
        result = run()
        self.machine.synchronize()
        first, started = time.perf_counter() - started, time.perf_counter()
        peak = self.machine.peak(run)
        again = time.perf_counter() - started
        if not torch.isfinite(result).all():
            raise WrongResult(f"{name}: expected finite latents, got NaN or infinity")
        error = self._error(name, result)
        self.bench.figures[name] = {
            "compile_seconds": max(0.0, first - again),
            # All beyond weights and other candidates. What graphs work in is seen in `reserved` alone
            "peak_bytes": peak - before["allocated"],
            "held_bytes": (after := self.machine.memory())["allocated"] - before["allocated"],
            "reserved_bytes": after["reserved"] - before["reserved"],
            "error": error,
            **more(),
        }
        self.log.figure(name=name, prepared=True, **self.bench.figures[name])
        return run

    def _error(self, name: str, result: Tensor) -> float | None:
        """Against reuse at module level (ours) or diffusers. Raises WrongResult above the tolerance."""
        if name == EAGER:
            self.bench.results[EAGER] = result.clone()
            return None
        if name in (NAIVE, TAYLORSEER):  # they compute something else than a full run, and are what they are
            return None
        if name in FULL_RUNS:
            expected, tolerance = self.bench.results[EAGER], 10 * GATE[self.work.dtype]
        else:
            expected, tolerance = self._module_level(), GATE[self.work.dtype]
        error = relative_error(result, expected)
        if not error <= tolerance:
            raise WrongResult(f"{name}: relative error {error:.1e}, expected at most {tolerance:.0e}; it is not timed")
        return error

    def _module_level(self) -> Tensor:
        if self.expected is None:
            self.expected = self._naive().clone()
        return self.expected

    def _naive(self) -> Tensor:
        reuse = ModuleReuse(self.work.model, self.schedule)
        try:
            return self.work.sample(self.work.around(reuse))
        finally:
            reuse.remove()

    def _make(self, name: str) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Any]]]:
        work = self.work
        if name == EAGER:
            return partial(work.sample, work.pipeline), dict
        if name == NAIVE:
            return self._naive, dict
        if name in (COMPILED, OVERHEAD):
            mode = {"mode": "reduce-overhead"} if name == OVERHEAD else {}
            whole = work.around(_StepMarked(work.model, torch.compile(work.model, **mode)))
            return partial(work.sample, whole), dict
        if name == TAYLORSEER:
            return self._taylorseer(), dict
        if name == TRAJECTORY:  # on the plan of the step graphs, where there is one: slots are large
            fast = self.made.get("cudagraph") or self._compiled("cudagraph")
            return work.trajectory(fast), partial(self._captured, fast)
        fast = self._compiled(OURS[name])
        return partial(work.sample, fast), partial(self._captured, fast)

    def _compiled(self, backend: str) -> PixelPipeline:
        self.made[backend] = self.work.compiled(self.schedule, backend)
        return self.made[backend]

    def _captured(self, fast: PixelPipeline) -> dict[str, Any]:
        (plan,) = fast.transformer._plans.values()
        loops = [loop.seconds for loop in plan.loops.graphs.values()]
        return {
            "plan_seconds": plan.seconds,
            "capture_seconds": (plan.graphs.seconds if plan.graphs else 0.0) + sum(loops),
            "graphs": len(plan.graphs.graphs) + len(loops) if plan.graphs else 0,
            "slot_bytes": plan.slot_bytes,
        }

    def _taylorseer(self) -> Callable[[], Tensor]:
        """Of the schedule's interval, with its order of forecast."""
        work, every = self.work, round(1 / (1 - self.schedule.cur))
        model = copy.deepcopy(work.model)  # hooks stay on it
        own = work.around(model)
        setting = f"order {self.schedule.order}, interval {every}"
        return partial(work.sample, taylorseer.prepare(own, setting, work.steps))


class _StepMarked(nn.Module):
    """A compiled model that tells CUDA graph trees where a call begins: outputs of the last one may be overwritten."""

    def __init__(self, model: nn.Module, compiled: Callable[..., Any]) -> None:
        super().__init__()
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        object.__setattr__(self, "compiled", compiled)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(*args, **kwargs)
