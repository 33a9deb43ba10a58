"""What a run's reused outputs stand on, to the end: by Gauss-Newton, with the noise levels of its steps if wanted.

Weights of outputs are a few dozen numbers that push the result along the same valleys, along which gradients crawl,
most of all where each half of the guidance has its own. So the latents' derivative by each number is taken, by
differences; no gradient goes through the model. A flow's sampler takes any noise levels, which are numbers as well.
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

from harmonica_rt.checks import positive
from harmonica_rt.compiled import Schedules
from harmonica_rt.generating import Generation
from harmonica_rt.schedule import Schedule

from .contexts import check_schedules, each, every, own_numbers
from .learn import check_minutes
from .sampled import Sampled, check_not_compiled
from .starts import HOLDS, Starts, check_power, check_target, decibels, mean
from .stopping import never
from .trainer import TRAIN_SEED
from .weights import VALIDATION_SEED

STEP = 1e-3  # of a difference, in noise levels and weights; float32's rounding is far below what it changes
KEPT = 0.7  # what an iteration's normal equations count in the next
PATIENCE = 3  # iterations in which nothing came closer, and no more are made
CLOSEST = 5e-3  # noise levels of neighbouring steps, and the last one's
FIRST, MOST = 0.1, 1e3  # damping, relative to the curvature: the first, and where nothing moves


@dataclass(frozen=True)
class RefineProgress:
    """After an iteration: seconds, and the error on what is held out, dB, of its target's variance."""

    iteration: int
    seconds: float
    error: float

    def __str__(self) -> str:
        return f"refine: iteration {self.iteration}, {-self.error:.2f} dB SNR held out, {self.seconds:.0f} s"


class OutputNumbers:
    """Weights of kept outputs, and noise levels of the computed steps if these may move, as one flat change.

    Steps between two computed ones move with them. What is added to the weights is the same at all reused steps between
    two computed ones, for it is their sum that counts.

    Args:
        schedules: whose steps are computed whole, or whose outputs are reused.
        levels: of the steps, falling, [T]; None where they stay.

    Attributes:
        nodes: steps that are computed in any context.
        size: numbers that are learned.
    """

    def __init__(self, schedules: Schedules, levels: Sequence[float] | None) -> None:
        self.schedules = schedules
        self.levels = None if levels is None else np.asarray(levels, dtype=np.float64)
        self.nodes = np.flatnonzero(np.any([~own.output for own in every(schedules)], axis=0))
        self._all_gaps = [gap for own in every(schedules) for gap in _gaps(own)]
        self.moving = 0 if levels is None else len(self.nodes) - 1
        self.size = self.moving + sum(k for _, k in self._all_gaps)

    def __call__(self, change: np.ndarray) -> tuple[Schedules, list[float] | None]:
        """The schedules, and where they may move, without timesteps, the noise levels of their steps."""
        added = iter(np.split(change, np.cumsum([self.moving, *(k for _, k in self._all_gaps)]))[1:])
        own: dict[str, Any] = {} if self.levels is None else {"timesteps": None}

        def changed(schedule: Schedule) -> Schedule:
            weights = schedule.output_weights.copy()
            for steps, k in _gaps(schedule):
                weights[steps, :k] += next(added)
            return schedule.replace(output_weights=weights, **own)

        schedules = each(self.schedules, changed)
        if self.levels is None:
            return schedules, None
        before, after = np.append(self.levels[self.nodes], 0.0), self._ends(self.levels, change)
        return schedules, np.interp(self.levels, before[::-1], after[::-1]).tolist()

    def falls(self, change: np.ndarray) -> bool:
        """Whether the levels of computed steps still fall."""
        return self.levels is None or bool((np.diff(self._ends(self.levels, change)) <= -CLOSEST).all())

    def _ends(self, levels: np.ndarray, change: np.ndarray) -> np.ndarray:
        """Levels of the computed steps, and 0, where the run ends; the first step's stays."""
        return np.append(levels[self.nodes] + np.append(0.0, change[: self.moving]), 0.0)


def _gaps(schedule: Schedule) -> list[tuple[np.ndarray, int]]:
    """Reused steps between computed ones, and how many outputs are kept there."""
    computed = np.flatnonzero(~schedule.output)
    ends = [*computed[1:], schedule.steps]
    gaps = [np.arange(first + 1, end) for first, end in zip(computed, ends)]
    return [(gap, min(i + 1, schedule.order + 1)) for i, gap in enumerate(gaps) if len(gap)]


def refine(
    pipeline: Any,
    schedules: Schedules,
    prompts: Sequence[str | int] | None = None,
    *,
    target: str = "full",
    times: bool = False,
    minutes: float = 15.0,
    iterations: int = 100,
    batch: int = 16,
    size: int = 16,
    validation: int = 32,
    power: float = 0.0,
    seed: int = 0,
    on_progress: Callable[[RefineProgress], None] = lambda progress: None,
    stopped: Callable[[], bool] = never,
    **call: Any,
) -> Schedules:
    """Learn the weights of output reuse to the end, from what `hrt.learn` or a rule made, by Gauss-Newton.

    Args:
        pipeline: a diffusers pipeline, not compiled, in float32.
        schedules: to start from, one or by context: output reuse alone. Own weights for each context start from the
            same for all: ``{"cond": schedule, "uncond": schedule}``.
        target: ``"full"``, the same run without reuse, or ``"converged"``, the solution that its sampler approximates.
        times: move the noise levels of computed steps too; of what is aimed at they stay. The result's call is told
            its levels: ``pipe(..., sigmas=[t / 1000 for t in schedule.timesteps])``. For calls that take ``sigmas`` and
            schedulers that do not shift them.
        batch: images an iteration, as many runs as there are numbers and one more; `size` a call.
        validation: images that tell the best numbers.
        power: as `hrt.learn` takes it: 0, all images count alike; 1, the mean squared error, so the worst count most.
        call: the pipeline's own arguments.

    Raises:
        TypeError, ValueError: naming what was expected and what came.
    """
    check_not_compiled(pipeline)
    check_schedules("schedules", schedules)
    check_target(target)
    check_power(power)
    check_minutes(minutes)
    counts = {"iterations": iterations, "batch": batch, "size": size, "validation": validation}
    for name, count in counts.items():
        positive(name, count)
    generation, sampled = Generation(pipeline, prompts, seed=seed, **call), Sampled(pipeline)
    _check(generation, schedules, times)
    for name, model in sampled.denoisers.items():
        if model.dtype != torch.float32:  # differences would be rounding
            raise ValueError(f"refine: expected a {name} in float32, got {model.dtype}")
    with sampled.ready():
        sampled.probe(generation, 0)
        timesteps = sampled.timesteps()
        for schedule in every(schedules):
            if schedule.steps != len(timesteps):
                raise ValueError(f"refine: expected a schedule of {len(timesteps)} steps, got {schedule.steps}")
        numbers = OutputNumbers(schedules, _levels(sampled) if times else None)
        task = _Runs(sampled, size, sampled.device)
        held = generation.count // 4 if generation.count >= 8 else 0
        subjects = range(generation.count)
        parts = (subjects[:-held], subjects[-held:]) if held else (subjects, subjects)
        learned_on, judged_on = (
            Starts(task, generation.at([own[i % len(own)] for i in range(count)], apart), target)
            for own, count, apart in zip(parts, (batch * 8, validation), (TRAIN_SEED + seed, VALIDATION_SEED + seed))
        )
        best, first, error = _search(
            numbers, learned_on, judged_on, batch, power, minutes, iterations, on_progress, stopped
        )
        found, levels = numbers(best)
        how = f"by Gauss-Newton, target {target}{f', power {power:g}' if power else ''}"
        note = f"{how}: SNR {-first:.1f} -> {-error:.1f} dB on {validation} held out"
        if levels is not None:
            with torch.no_grad():
                sampled.run(_told(generation, levels), [0])
            timesteps = sampled.timesteps()
            note = f"times and weights {note}; to be called with sigmas, a thousandth of its timesteps"

        fields: dict[str, Any] = {
            "sampler": type(pipeline.scheduler).__name__,
            "timesteps": timesteps,
            "guidance_scale": generation.guidance,
        }

        def said(own: Schedule) -> Schedule:
            before = own.note.replace(HOLDS, "").strip("; ")
            return own.replace(note="; ".join([*filter(None, [before]), note, HOLDS]), **fields)

        return each(found, said)


def _told(generation: Generation, levels: list[float] | None) -> Generation:
    return generation if levels is None else generation.with_call(sigmas=levels)


@dataclass
class _Runs:
    """What `Starts` needs of a task."""

    sampled: Sampled
    size: int
    device: torch.device
    carry: bool = False


def _search(
    numbers: OutputNumbers,
    learned_on: Starts,
    judged_on: Starts,
    batch: int,
    power: float,
    minutes: float,
    iterations: int,
    on_progress: Callable[[RefineProgress], None],
    stopped: Callable[[], bool],
) -> tuple[np.ndarray, float, float]:
    """The best change, the error that it started from, and its own, dB."""
    began, damping, failed = time.perf_counter(), FIRST, 0
    now = np.zeros(numbers.size)
    first = error = _judge(numbers, now, judged_on, power)
    left, right = np.zeros((numbers.size, numbers.size)), np.zeros(numbers.size)  # of the normal equations
    for iteration in range(iterations):
        if failed == PATIENCE or stopped() or time.perf_counter() - began > 60 * minutes:
            break
        curvature, gradient = _normal_equations(numbers, now, learned_on, iteration, batch, power)
        kept = 1.0 if failed else KEPT  # more images, where those there were told nothing
        left, right = kept * left + curvature, kept * right + curvature @ now - gradient
        while damping < MOST:
            scale = damping * np.diag(np.diag(left))
            tried = np.linalg.solve(left + scale, right + scale @ now)
            if numbers.falls(tried) and (own := _judge(numbers, tried, judged_on, power)) < error:
                now, error, damping, failed = tried, own, max(damping / 4, 1e-6), 0
                break
            damping *= 4
        else:
            damping, failed = FIRST, failed + 1
        on_progress(RefineProgress(iteration + 1, time.perf_counter() - began, error))
    return now, first, error


def _parts(starts: Starts, first: int, count: int) -> list[tuple[int, int]]:
    return [(i, min(i + starts.size, first + count)) for i in range(first, first + count, starts.size)]


@torch.no_grad()
def _results(numbers: OutputNumbers, change: np.ndarray, starts: Starts, parts: list[tuple[int, int]]) -> list[Tensor]:
    schedules, levels = numbers(change)
    own, generation = own_numbers(schedules, starts.device), _told(starts.generation, levels)
    return [starts.task.sampled.run(generation, range(*part), schedules, own) for part in parts]


def _judge(numbers: OutputNumbers, change: np.ndarray, starts: Starts, power: float) -> float:
    """Mean error, dB."""
    parts = _parts(starts, 0, len(starts))
    errors = [starts.errors(own, *part) for own, part in zip(_results(numbers, change, starts, parts), parts)]
    found = mean(decibels(torch.cat(errors)), power)
    return found if math.isfinite(found) else math.inf


def _normal_equations(
    numbers: OutputNumbers, change: np.ndarray, starts: Starts, iteration: int, batch: int, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """J^T J and J^T e of the next images, of their squared errors to `power`: at 0 of the logarithm."""
    parts = _parts(starts, iteration * batch % len(starts), batch)

    def results(own: np.ndarray) -> Tensor:
        return torch.cat(_results(numbers, own, starts, parts)).flatten(1).double()

    base = results(change)
    error = base - torch.cat([starts.end(*part) for part in parts]).flatten(1)
    columns = [(results(change + STEP * unit) - base) / STEP for unit in np.eye(numbers.size)]
    norm = error.norm(dim=1)
    weight = norm ** (power - 1) / norm.log().mean().exp() ** power  # over what is common, or early iterations rule
    rows, error = torch.stack(columns, 1) * weight[:, None, None], error * weight[:, None]
    return torch.einsum("ipd,iqd->pq", rows, rows).cpu().numpy(), torch.einsum("ipd,id->p", rows, error).cpu().numpy()


def _check(generation: Generation, schedules: Schedules, times: bool) -> None:
    if times and not generation.takes("sigmas"):
        raise ValueError(
            f"times: expected a pipeline whose call takes sigmas, got {type(generation.pipeline).__name__}"
        )
    if times and generation.call.get("sigmas") is not None:
        raise ValueError(f"times: expected a call without sigmas, got {generation.call['sigmas']}")
    for schedule in every(schedules):
        if not schedule.output.any() or not schedule.compute[~schedule.output].all():
            raise ValueError(f"refine: expected a schedule that reuses the output and nothing else, got {schedule}")


def _levels(sampled: Sampled) -> list[float]:
    """Of the run that was made last, as its call would be told them."""
    scheduler, timesteps = sampled.pipeline.scheduler, sampled.timesteps()
    levels = [*map(float, scheduler.sigmas[:-1])]
    if not np.allclose(timesteps, 1000 * np.asarray(levels), atol=1e-2):
        raise ValueError(
            f"times: expected a flow's scheduler, whose timesteps are a thousand times its sigmas, got {timesteps[:3]} "
            f"and {levels[:3]} of {type(scheduler).__name__}"
        )
    if scheduler.config.get("use_dynamic_shifting") or scheduler.config.get("shift", 1.0) != 1.0:
        raise ValueError(f"times: expected a scheduler that does not shift sigmas, got {dict(scheduler.config)}")
    return levels
