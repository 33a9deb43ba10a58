"""Learning through a pipeline: what was predicted to be held, what is, and what an iteration takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import harmonica_rt as hrt
from harmonica_rt.generating import Generation
from harmonica_rt.train.contexts import ContextWeights
from harmonica_rt.train.pipeline_task import PipelineTask
from harmonica_rt.train.sampled import Sampled
from harmonica_rt.train.weights import WeightSettings

from .machine import Machine
from .parts import EMOJI, FLUX, TINY, WIDE, Parts
from .record import Case, Log

STAGE = "learning"
SPEEDUP, ORDER = 2.5, 2
LEVELS = (("blocks", 1), ("blocks", 4), ("branches", 1), ("output", 1))
FULL = ((EMOJI, LEVELS, 25), (WIDE, LEVELS, 35), (FLUX, LEVELS[:3], 150))
DRY = ((TINY, LEVELS[:1], 30),)


def cases(machine: Machine) -> list[Case]:
    found = [
        Case(STAGE, parts.name, seconds, partial(iterations, machine, parts, levels))
        for parts, levels, seconds in (DRY if machine.dry else FULL)
    ]
    whole = TINY if machine.dry else EMOJI
    return [Case(STAGE, f"{whole.name}, whole", 40, partial(learned, machine, whole)), *found]


def iterations(machine: Machine, parts: Parts, levels: tuple[tuple[str, int], ...], log: Log) -> None:
    """One iteration a level, of one image."""
    pipeline, call = parts.make(machine)
    for level, groups in levels:
        name = f"{level}, {groups} groups" if groups > 1 else level
        log.attempt(name, partial(_iteration, machine, pipeline, call, level, groups, name, log))
        torch.cuda.empty_cache()


def _iteration(
    machine: Machine, pipeline: Any, call: dict[str, Any], level: str, groups: int, name: str, log: Log
) -> None:
    sampled, times = Sampled(pipeline), {}
    channels = level == "blocks"
    with sampled.ready():
        task = PipelineTask(sampled, Generation(pipeline, **call), level, groups, 1)
        schedule = task.schedule(task.spread(SPEEDUP), ORDER)
        settings = WeightSettings(
            iterations=1, batch=1, pool=1, carry=task.carry, channels=channels, checkpointing="steps"
        )
        started = time.perf_counter()
        memory = task.memory(schedule, settings)
        times["prediction"] = time.perf_counter() - started
        starts = task.starts("full", 1, 5)
        times["target"] = _timed(machine, lambda: starts.end(0, 1))
        weights = ContextWeights(schedule, task.device, task.carry, task.width if channels else None)

        def iterate() -> None:
            change = weights.change.repeat(1, 1).requires_grad_()
            errors = starts.errors(starts.result(schedule, weights(change), 0, 1, "steps"), 0, 1)
            (gradient,) = torch.autograd.grad(errors.sum(), change)
            assert gradient.isfinite().all(), "expected a finite gradient"

        peak = machine.peak(lambda: times.update(iteration=_timed(machine, iterate)))
        log.figure(
            name=name,
            predicted_bytes=memory.total,
            parts={k: getattr(memory, k) for k in ("weights", "step", "values", "numbers", "samples", "libraries")},
            peak_bytes=peak,
            ratio=memory.total / peak if peak else None,
            seconds=times,
            learned=len(weights.change),
            steps=task.steps,
        )


def _timed(machine: Machine, run: Callable[[], Any]) -> float:
    machine.synchronize()
    started = time.perf_counter()
    run()
    machine.synchronize()
    return time.perf_counter() - started


def learned(machine: Machine, parts: Parts, log: Log) -> None:
    """All of `learn`, short: a schedule comes out that the pipeline runs with."""
    pipeline, call = parts.make(machine)
    started = time.perf_counter()
    schedule = hrt.learn(pipeline, target_speedup=2.0, iterations=3, batch=2, validation=2, **call)
    seconds = time.perf_counter() - started
    fast = hrt.compile(pipeline, schedule)
    latents = fast(**call, generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False)[0]
    log.figure(name="learn", seconds=seconds, note=schedule.note, finite=bool(torch.isfinite(latents).all()))
