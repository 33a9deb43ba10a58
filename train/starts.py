"""Where training's runs start, and where they should end."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from harmonica_rt.compiled import Schedules
from harmonica_rt.schedule import Schedule

from .contexts import NumbersOf, own_numbers
from .denoiser import compute
from .reusing import Reusing
from .task import Batch, Task, Trajectory

DETERMINISTIC = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
)
CONVERGED_STEPS = 100  # of DPM-Solver++


class Starts(ABC):
    """Where runs start, and where they should end; each target is computed once.

    Attributes:
        device: of the errors.
        size: runs at a time, where no gradient is needed.
    """

    device: torch.device
    size: int = 16

    def __init__(self) -> None:
        self.ends: dict[tuple[int, int], Tensor] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def target_of(self, start: int, end: int) -> Tensor:
        """What these runs should result in, [end - start, ...]."""

    @abstractmethod
    def result(
        self, schedules: Schedules, numbers: NumbersOf | None, start: int, end: int, checkpointing: str = "none"
    ) -> Tensor:
        """What these runs result in with schedules, differentiable in `numbers`; the schedules' own unless given."""

    def errors(self, result: Tensor, start: int, end: int) -> Tensor:
        """log of the mean squared error of each run's `result`, [end - start]."""
        return ((result.float() - self.end(start, end)).square().flatten(1).mean(1) + 1e-12).log()

    def prepare(self, accelerator: Accelerator) -> Iterator[int]:
        """Compute the targets that `judge` asks for; how many there are by now, as often in every process."""
        rank, ranks, size = accelerator.process_index, accelerator.num_processes, self.size
        for first in range(0, len(self), ranks * size):
            yield first
            if (own := first + rank * size) < len(self):
                self.end(own, min(own + size, len(self)))

    @torch.no_grad()
    def judge(self, schedules: Schedules, accelerator: Accelerator) -> Tensor:
        """Each run's error with schedules, dB: 10 log10 of the mean squared error. [len]

        Args:
            accelerator: over whose processes the runs are spread.
        """
        errors = torch.zeros(len(self), device=self.device)
        rank, ranks, size = accelerator.process_index, accelerator.num_processes, self.size
        for first in range(rank * size, len(self), ranks * size):
            last = min(first + size, len(self))
            with accelerator.autocast():
                result = self.result(schedules, None, first, last)
            errors[first:last] = decibels(self.errors(result, first, last))
        return accelerator.reduce(errors, "sum") if ranks > 1 else errors

    def end(self, start: int, end: int) -> Tensor:
        """The targets of these runs, computed at the first asking."""
        if (start, end) not in self.ends:
            with torch.no_grad():
                self.ends[start, end] = self.target_of(start, end).float()
        return self.ends[start, end]


class TaskStarts(Starts):
    """Those of a task.

    Args:
        target: the run that is aimed at, as in `WeightSettings`.
        count, seed: starts, and what they depend on.
    """

    def __init__(self, task: Task, target: str, count: int, seed: int) -> None:
        super().__init__()
        self.task, self.target = task, task if target == "full" else converged(task)
        self.device, self.batch = task.device, task.draw(count, seed)

    def __len__(self) -> int:
        return len(self.batch)

    def run(self, start: int, end: int) -> Trajectory:
        """A run of these starts."""
        return Trajectory(self.task, self.batch.part(start, end))

    def result(
        self, schedules: Schedule, numbers: NumbersOf | None, start: int, end: int, checkpointing: str = "none"
    ) -> Tensor:
        numbers = own_numbers(schedules, self.device) if numbers is None else numbers
        return Reusing(schedules, numbers(None), checkpointing).run(self.run(start, end))

    def target_of(self, start: int, end: int) -> Tensor:
        return full_run(self.target, self.batch.part(start, end))


def starts_of(task: Any, target: str, count: int, seed: int) -> Starts:
    """Those of a `Task`, or of a pipeline's (`PipelineTask`)."""
    return TaskStarts(task, target, count, seed) if isinstance(task, Task) else task.starts(target, count, seed)


def decibels(logarithm: Tensor) -> Tensor:
    return 10 / math.log(10) * logarithm


def mean(errors: Tensor) -> float:
    """The same number on every kind of device, since processes decide by it."""
    return math.fsum(errors.tolist()) / len(errors)


@torch.no_grad()
def full_run(task: Task, batch: Batch) -> Tensor:
    """The sampler's result without reuse."""
    run = Trajectory(task, batch)
    while not run.done:
        run.advance(run.denoise(compute))
    return run.x


def converged(task: Task, steps: int = CONVERGED_STEPS) -> Task:
    """The same model and guidance with a sampler that has as good as converged: DPM-Solver++ with many steps."""
    return task.with_sampler(converged_scheduler(task.scheduler), steps)


def converged_scheduler(scheduler: Any) -> Any:
    """The sampler that shares the solution of `scheduler`, and has as good as converged in `CONVERGED_STEPS`.

    Raises:
        ValueError: `scheduler` draws noise, so that no other sampler shares its solution.
    """
    from diffusers import DPMSolverMultistepScheduler

    name, config = type(scheduler).__name__, scheduler.config
    if name not in DETERMINISTIC or str(config.get("algorithm_type", "")).startswith("sde"):
        raise ValueError(f"target converged: expected a deterministic sampler of {DETERMINISTIC}, got {name}")
    kept = {k: config[k] for k in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")}
    return DPMSolverMultistepScheduler(**kept, prediction_type=config["prediction_type"])
