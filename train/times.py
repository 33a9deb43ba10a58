"""Where the computed steps of a run lie in time, learned together with what its reused outputs stand on.

A flow's sampler takes any noise levels, so a run that computes few steps need not compute them at levels of a longer
one's grid. Levels and weights are a few dozen numbers that push the result along the same valleys, so both are found by
Gauss-Newton: the latents' derivative by each number, by differences; no gradient goes through the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonica_rt.compiled import Schedules
from harmonica_rt.generating import Generation
from harmonica_rt.schedule import Schedule

from .contexts import each, every, own_numbers
from .sampled import Sampled
from .starts import Starts, decibels
from .stopping import never
from .trainer import TRAIN_SEED
from .weights import VALIDATION_SEED

STEP = 1e-3  # of a difference, in noise levels and weights; float32's rounding is far below what it changes
KEPT = 0.7  # what an iteration's normal equations count in the next
CLOSEST = 5e-3  # noise levels of neighbouring steps, and the last one's
MOST = 1e3  # damping, relative to the curvature: beyond it nothing moves


@dataclass(frozen=True)
class TimesProgress:
    """After an iteration: seconds, and the error on what is held out, dB, of its target's variance."""

    iteration: int
    seconds: float
    error: float

    def __str__(self) -> str:
        return f"times: iteration {self.iteration}, {-self.error:.2f} dB SNR held out, {self.seconds:.0f} s"


class Times:
    """Noise levels of the computed steps, and weights of the outputs they keep, as one flat change.

    Steps between two computed ones move with them. What is added to the weights is the same at all reused steps between
    two computed ones, for it is their sum that counts.

    Args:
        schedules: whose steps are computed whole, or whose outputs are reused.
        levels: of the steps, falling, [T].

    Attributes:
        nodes: steps that are computed in any context.
        size: numbers that are learned.
    """

    def __init__(self, schedules: Schedules, levels: Sequence[float]) -> None:
        self.schedules, self.levels = schedules, np.asarray(levels, dtype=np.float64)
        self.nodes = np.flatnonzero(np.any([~own.output for own in every(schedules)], axis=0))
        self._all_gaps = [gap for own in every(schedules) for gap in _gaps(own)]
        self.size = len(self.nodes) - 1 + sum(k for _, k in self._all_gaps)

    def __call__(self, change: np.ndarray) -> tuple[Schedules, list[float]]:
        """The schedules, without timesteps, and the noise levels of their steps."""
        before, after = np.append(self.levels[self.nodes], 0.0), self.moved(change)
        levels = np.interp(self.levels, before[::-1], after[::-1])
        added = iter(np.split(change, np.cumsum([len(self.nodes) - 1, *(k for _, k in self._all_gaps)]))[1:])

        def changed(schedule: Schedule) -> Schedule:
            weights = schedule.output_weights.copy()
            for steps, k in _gaps(schedule):
                weights[steps, :k] += next(added)
            return schedule.replace(output_weights=weights, timesteps=None)

        return each(self.schedules, changed), levels.tolist()

    def moved(self, change: np.ndarray) -> np.ndarray:
        """Levels of the computed steps, and 0, where the run ends; the first step's stays."""
        return np.append(self.levels[self.nodes] + np.append(0.0, change[: len(self.nodes) - 1]), 0.0)

    def falls(self, change: np.ndarray) -> bool:
        """Whether the levels of computed steps still fall."""
        return bool((np.diff(self.moved(change)) <= -CLOSEST).all())


def _gaps(schedule: Schedule) -> list[tuple[np.ndarray, int]]:
    """Reused steps between computed ones, and how many outputs are kept there."""
    computed = np.flatnonzero(~schedule.output)
    ends = [*computed[1:], schedule.steps]
    gaps = [np.arange(first + 1, end) for first, end in zip(computed, ends)]
    return [(gap, min(i + 1, schedule.order + 1)) for i, gap in enumerate(gaps) if len(gap)]


def learn_times(
    pipeline: Any,
    schedules: Schedules,
    prompts: Sequence[str | int] | None = None,
    *,
    minutes: float = 15.0,
    iterations: int = 100,
    batch: int = 16,
    size: int = 16,
    validation: int = 32,
    seed: int = 0,
    on_progress: Callable[[TimesProgress], None] = lambda progress: None,
    stopped: Callable[[], bool] = never,
    **call: Any,
) -> Schedules:
    """Learn at which noise levels a flow's steps are computed, and the weights of output reuse with them.

    What is aimed at is the pipeline's own run, at its own levels. The result runs at others, so its call is told them:
    ``pipe(..., sigmas=[t / 1000 for t in schedule.timesteps])``.

    Args:
        pipeline: a diffusers pipeline whose call takes ``sigmas``, not compiled, in float32; its scheduler does not
            shift them.
        schedules: to start from, one or by context: output reuse alone, learned or by rule.
        batch: images an iteration, as many runs as there are numbers and one more; `size` a call.
        validation: images that tell the best numbers.
        call: the pipeline's own arguments.

    Raises:
        ValueError: naming what was expected and what came.
    """
    generation, sampled = Generation(pipeline, prompts, seed=seed, **call), Sampled(pipeline)
    _check(generation, schedules)
    with sampled.ready():
        sampled.probe(generation, 0)
        levels = [*map(float, sampled.pipeline.scheduler.sigmas[:-1])]
        _check_levels(sampled, every(schedules), levels)
        times, task = Times(schedules, levels), _Runs(sampled, size, sampled.device)
        held = generation.count // 4 if generation.count >= 8 else 0
        numbers = range(generation.count)
        parts = (numbers[:-held], numbers[-held:]) if held else (numbers, numbers)
        learned_on, judged_on = (
            Starts(task, generation.at([own[i % len(own)] for i in range(count)], apart), "full")
            for own, count, apart in zip(parts, (batch * 8, validation), (TRAIN_SEED + seed, VALIDATION_SEED + seed))
        )
        best, first, error = _search(times, learned_on, judged_on, batch, minutes, iterations, on_progress, stopped)
        found, levels = times(best)
        with torch.no_grad():
            sampled.run(generation.with_call(sigmas=levels), [0])
        note = (
            f"times and weights by Gauss-Newton: SNR {-first:.1f} -> {-error:.1f} dB on {validation} held out; "
            "to be called with sigmas, a thousandth of its timesteps"
        )
        return each(
            found, lambda own: own.replace(timesteps=sampled.timesteps(), note=f"{own.note}; {note}".strip("; "))
        )


@dataclass
class _Runs:
    """What `Starts` needs of a task."""

    sampled: Sampled
    size: int
    device: torch.device
    carry: bool = False


def _search(
    times: Times,
    learned_on: Starts,
    judged_on: Starts,
    batch: int,
    minutes: float,
    iterations: int,
    on_progress: Callable[[TimesProgress], None],
    stopped: Callable[[], bool],
) -> tuple[np.ndarray, float, float]:
    """The best change, the error that it started from, and its own, dB."""
    began, damping = time.perf_counter(), 0.1
    now = np.zeros(times.size)
    first = error = _judge(times, now, judged_on)
    left, right = np.zeros((times.size, times.size)), np.zeros(times.size)  # of the normal equations
    for iteration in range(iterations):
        if stopped() or time.perf_counter() - began > 60 * minutes:
            break
        curvature, gradient = _normal_equations(times, now, learned_on, iteration, batch)
        left, right = KEPT * left + curvature, KEPT * right + curvature @ now - gradient
        while damping < MOST:
            scale = damping * np.diag(np.diag(left))
            tried = np.linalg.solve(left + scale, right + scale @ now)
            if times.falls(tried) and (own := _judge(times, tried, judged_on)) < error:
                now, error, damping = tried, own, max(damping / 4, 1e-6)
                break
            damping *= 4
        else:
            break
        on_progress(TimesProgress(iteration + 1, time.perf_counter() - began, error))
    return now, first, error


def _results(times: Times, change: np.ndarray, starts: Starts, first: int, count: int) -> Tensor:
    schedules, levels = times(change)
    sampled, size = starts.task.sampled, starts.size
    own, generation = own_numbers(schedules, starts.device), starts.generation.with_call(sigmas=levels)
    with torch.no_grad():
        parts = [range(i, min(i + size, first + count)) for i in range(first, first + count, size)]
        return torch.cat([sampled.run(generation, part, schedules, own) for part in parts])


def _ends(starts: Starts, first: int, count: int) -> Tensor:
    parts = [(i, min(i + starts.size, first + count)) for i in range(first, first + count, starts.size)]
    return torch.cat([starts.end(*part) for part in parts])


def _judge(times: Times, change: np.ndarray, starts: Starts) -> float:
    """Mean error, dB."""
    errors = _results(times, change, starts, 0, len(starts)) - (ends := _ends(starts, 0, len(starts)))
    relative = errors.square().flatten(1).mean(1) / ends.flatten(1).var(1)
    mean = decibels(relative.log()).mean().item()
    return mean if math.isfinite(mean) else math.inf


def _normal_equations(
    times: Times, change: np.ndarray, starts: Starts, iteration: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """J^T J and J^T e of the next images, each by its squared error: of its logarithm."""
    first = iteration * batch % len(starts)

    def results(own: np.ndarray) -> Tensor:
        return _results(times, own, starts, first, batch).flatten(1).double()

    base = results(change)
    error = base - _ends(starts, first, batch).flatten(1)
    columns = [(results(change + STEP * unit) - base) / STEP for unit in np.eye(times.size)]
    rows = torch.stack(columns, 1) / error.norm(dim=1)[:, None, None]  # [images, numbers, latents]
    error = error / error.norm(dim=1, keepdim=True)
    return torch.einsum("ipd,iqd->pq", rows, rows).cpu().numpy(), torch.einsum("ipd,id->p", rows, error).cpu().numpy()


def _check(generation: Generation, schedules: Schedules) -> None:
    kind = type(generation.pipeline).__name__
    if not generation.takes("sigmas"):
        raise ValueError(f"times: expected a pipeline whose call takes sigmas, got {kind}")
    if generation.call.get("sigmas") is not None:
        raise ValueError(f"times: expected a call without sigmas, got {generation.call['sigmas']}")
    for schedule in every(schedules):
        if not schedule.output.any() or not schedule.compute[~schedule.output].all():
            raise ValueError(f"times: expected a schedule that reuses the output and nothing else, got {schedule}")


def _check_levels(sampled: Sampled, schedules: list[Schedule], levels: list[float]) -> None:
    timesteps = sampled.timesteps()
    if not np.allclose(timesteps, 1000 * np.asarray(levels), atol=1e-2):
        raise ValueError(
            f"times: expected a flow's scheduler, whose timesteps are a thousand times its sigmas, got {timesteps[:3]} "
            f"and {levels[:3]} of {type(sampled.pipeline.scheduler).__name__}"
        )
    config = sampled.pipeline.scheduler.config
    if config.get("use_dynamic_shifting") or config.get("shift", 1.0) != 1.0:
        raise ValueError(f"times: expected a scheduler that does not shift sigmas, got shift {config.get('shift')}")
    for schedule in schedules:
        if schedule.steps != len(levels):
            raise ValueError(f"times: expected a schedule of {len(levels)} steps, got {schedule.steps}")
