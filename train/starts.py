"""Where training's runs start on a pipeline, and where they should end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from harmonica_rt.compiled import Schedules
from harmonica_rt.generating import Generation

from .contexts import NumbersOf, own_numbers
from .sampled import Sampled

TARGETS = ("full", "converged")
HOLDS = "for this guidance and number of steps alone"  # of a learned schedule's note: bench/CARRY_OVER.md


class Runs(Protocol):
    """What of a `PipelineTask` its runs need."""

    sampled: Sampled
    device: torch.device
    size: int
    carry: bool


class Starts:
    """Prompts and noises of a pipeline; each target is computed once.

    Args:
        target: the run that is aimed at, as in `WeightSettings`.

    Attributes:
        device: of the errors.
        ends: targets by (start, end).
    """

    def __init__(self, task: Runs, generation: Generation, target: str) -> None:
        self.task, self.generation, self.device, self.size = task, generation, task.device, task.size
        self._aim = task.sampled.converged if target == "converged" else task.sampled.run
        self.ends: dict[tuple[int, int], Tensor] = {}
        task.sampled.encode(generation, task.size)

    def __len__(self) -> int:
        return self.generation.count

    def result(
        self, schedules: Schedules, numbers: NumbersOf | None, start: int, end: int, checkpointing: str = "none"
    ) -> Tensor:
        """What these runs result in with schedules, differentiable in `numbers`; the schedules' own unless given."""
        own = own_numbers(schedules, self.device) if numbers is None else numbers
        result = self.task.sampled.run(
            self.generation, range(start, end), schedules, own, checkpointing, self.task.carry
        )
        if numbers is not None and torch.is_grad_enabled() and not result.requires_grad:
            kind = type(self.task.sampled.pipeline).__name__
            raise ValueError(
                f"expected latents of {kind} that depend on what is reused, got none: its call, or "
                "its scheduler, turns gradients off"
            )
        return result

    def errors(self, result: Tensor, start: int, end: int) -> Tensor:
        """log of each run's mean squared error, of its target's variance, [end - start]: their dB are a SNR's."""
        target = self.end(start, end)
        error = (result.float() - target).square().flatten(1).mean(1) + 1e-12
        return (error / target.flatten(1).var(1).clamp(min=1e-12)).log()

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
            errors[first:last] = decibels(self.errors(self.result(schedules, None, first, last), first, last))
        return accelerator.reduce(errors, "sum") if ranks > 1 else errors

    def end(self, start: int, end: int) -> Tensor:
        """The targets of these runs, [end - start, ...], computed at the first asking."""
        if (start, end) not in self.ends:
            with torch.no_grad():
                self.ends[start, end] = self._aim(self.generation, range(start, end)).float()
        return self.ends[start, end]


def decibels(logarithm: Tensor) -> Tensor:
    return 10 / math.log(10) * logarithm


def check_target(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {TARGETS}, got {target!r}")


def check_power(power: float) -> None:
    if not 0 <= power < math.inf:
        raise ValueError(f"power: expected a number of at least 0, got {power}")


def mean(errors: Tensor, power: float = 0.0) -> float:
    """Of errors in dB, the same number on every kind of device, since processes decide by it.

    Args:
        power: that errors are raised to before their mean is taken, and after it lowered by, in dB again: 0 is the mean
            of the dB, where all count alike, 1 that of the errors, where the worst count most.
    """
    own = errors.tolist()
    if power == 0:
        return math.fsum(own) / len(own)
    most = max(own)
    return most + 10 / power * math.log10(math.fsum(10 ** (power * (e - most) / 10) for e in own) / len(own))
