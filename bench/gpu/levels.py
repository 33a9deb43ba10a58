"""Levels blocks, branches and output on models of the sizes that people run: their pipelines' own calls, in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import harmonica_rt as hrt
from bench.measure.latency import EAGER
from bench.measure.timing import interleave
from harmonica_rt.compiled import put
from harmonica_rt.measuring import Timing, ratio
from harmonica_rt.pipeline_copies import another

from .machine import Machine
from .parts import FLUX, TINY, WAN, Parts, run_of
from .record import Case, Log
from .workload import relative_error

STAGE = "levels"
REPEATED = "compile_repeated_blocks"
# every, level, backend
OURS = (
    (3, "blocks", "inductor"),
    (3, "blocks", "cudagraph"),
    (3, "branches", "cudagraph"),
    (2, "blocks", "inductor"),
    (1, "blocks", "inductor"),
    (3, "output", REPEATED),
)
FULL = ((FLUX, 130), (WAN, 100))
DRY = ((TINY, 60),)


def cases(machine: Machine, rounds: int = 3) -> list[Case]:
    return [
        Case(STAGE, parts.name, seconds, partial(measure, machine, parts, rounds))
        for parts, seconds in (DRY if machine.dry else FULL)
    ]


def measure(machine: Machine, parts: Parts, rounds: int, log: Log) -> None:
    """One row a candidate; ratios are medians over rounds."""
    pipeline, call = parts.make(machine)
    steps, model = call["num_inference_steps"], pipeline.transformer
    runs: dict[str, Callable[[], Tensor]] = {}
    about: dict[str, dict[str, Any]] = {}
    compiled = another(pipeline)

    def add(name: str, make: Callable[[], Any], expected: Callable[[], Tensor] | None = None, **more: Any) -> None:
        def prepare() -> None:
            held, started = machine.memory()["allocated"], time.perf_counter()
            run = run_of(make(), call)
            result = run()
            machine.synchronize()
            first, started = time.perf_counter() - started, time.perf_counter()
            peak = machine.peak(run)
            again = time.perf_counter() - started
            finite = bool(torch.isfinite(result).all())
            about[name] = {**more, "compile_seconds": max(0.0, first - again), "peak_bytes": peak, "finite": finite}
            about[name] |= {"own_bytes": peak - held}
            if expected is not None:
                about[name]["error"] = relative_error(result, expected())
            runs[name] = run

        log.attempt(name, prepare)

    def repeated() -> Any:
        own = copy.deepcopy(model)
        own.compile_repeated_blocks()
        put(compiled, "transformer", own)
        return compiled

    with machine.graphs():
        add(EAGER, lambda: pipeline)
        if not machine.dry:
            add(REPEATED, repeated)
        for every, level, backend in OURS:
            whole = backend == REPEATED
            if machine.dry and backend != "cudagraph":  # each takes a minute to compile on a CPU
                continue
            schedule = hrt.Schedule.uniform(
                model, steps, every, 1, level=level, sampler=type(pipeline.scheduler).__name__
            )
            base = compiled if whole else pipeline
            add(
                f"{level}:{every}, {backend}",
                partial(_compiled, base, schedule, "eager" if whole else backend),
                level=level,
                every=every,
                expected=None if whole else partial(_plainly, pipeline, schedule, call),
                theory=theory(schedule),
            )
        timings = clocked(machine, runs, rounds)
    for name, timing in timings.items():
        milliseconds = {f"p{q}_ms": 1e3 * timing.percentile(q) for q in (20, 80)}
        speedup = {"speedup": ratio(timings[EAGER], timing)} if EAGER in timings else {}
        if REPEATED in timings:
            speedup["speedup_over_compile"] = ratio(timings[REPEATED], timing)
        figures = {"device_ms": 1e3 * timing.median, **milliseconds, **speedup, **about[name]}
        log.figure(name=name, size=parts.name, steps=steps, rounds=rounds, **figures)


def theory(schedule: hrt.Schedule) -> float:
    """Steps over computed ones: what is around the blocks costs nearly nothing in models of this size."""
    computed = ~schedule.output if schedule.output.any() else schedule.compute.reshape(schedule.steps, -1).any(1)
    return schedule.steps / int(computed.sum())


def clocked(machine: Machine, runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """By the device's own clock, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    interleave({name: machine.clocked(run, seconds[name]) for name, run in runs.items()}, rounds, warmup=0)
    return {name: Timing(tuple(own)) for name, own in seconds.items()}


def _compiled(pipeline: Any, schedule: hrt.Schedule, backend: str) -> Any:
    return hrt.compile(another(pipeline), schedule, backend=backend)


def _plainly(pipeline: Any, schedule: hrt.Schedule, call: dict[str, Any]) -> Tensor:
    """The same schedule by plain launches."""
    fast = _compiled(pipeline, schedule, "eager")
    try:
        return run_of(fast, call)()
    finally:
        hrt.uncompile(fast)
