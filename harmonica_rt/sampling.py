"""The sampler around compiled denoisers: where its run is, and what its scheduler says of it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .schedule import Schedule
from .tracking import RunTracker


def _nothing() -> None:
    """The pipeline of a bare model."""


def _reference(something: Any) -> Callable[[], Any]:
    if something is None:
        return _nothing
    try:
        return weakref.ref(something)
    except TypeError:  # a dict, say
        return lambda: something


class Sampling:
    """Follows the runs of one sampler, for all denoisers it calls in turn.

    Args:
        schedules: theirs, of as many steps each.
        strict: refuse a scheduler that they were not made for; a warning names both otherwise.
        pipeline: whose scheduler tells when a run starts and what its timesteps are, if any.

    Attributes:
        tracker: where the run under way is.
        runs: how many have begun or were cut short; values kept before the last one are void.
    """

    def __init__(self, schedules: Sequence[Schedule], strict: bool, pipeline: Any) -> None:
        self.schedules, self.strict = tuple(schedules), strict
        self.steps = self.schedules[0].steps
        self.pipeline = _reference(pipeline)
        self.tracker = RunTracker(self.steps, self._own_timesteps)
        self.runs = 0
        self._last_scheduler: Callable[[], Any] = _nothing
        self._timesteps: Tensor | None = None  # of the scheduler, as last seen
        self._warned: set[str] = set()

    @property
    def _own_timesteps(self) -> tuple[float, ...] | None:
        return next((s.timesteps for s in self.schedules if s.timesteps is not None), None)

    def scheduler(self) -> Any:
        """Of the pipeline these denoisers were compiled for; once that is gone, as long as another one uses it."""
        scheduler = getattr(self.pipeline(), "scheduler", None)
        if scheduler is not None and scheduler is not self._last_scheduler():
            self._last_scheduler = _reference(scheduler)
        return self._last_scheduler()

    def end_run(self, entry: int = 0) -> None:
        """The next call starts a run, at step `entry` if its timestep does not tell."""
        self.tracker.reset(entry)
        self.runs += 1

    def abandon(self) -> None:
        """The run under way cannot go on."""
        self.tracker.abandon()
        self.runs += 1

    def watch(self) -> None:
        """A pipeline's scheduler makes new timesteps for each run: check them against the schedules, once a run."""
        scheduler = self.scheduler()
        timesteps = None if scheduler is None else scheduler.timesteps
        if timesteps is self._timesteps or self._is_made_anew(scheduler, timesteps):
            return
        if scheduler is not None:
            self.follow(scheduler)
        else:
            self.end_run()
            self.tracker.timesteps = self._own_timesteps
        self._timesteps = timesteps

    def _is_made_anew(self, scheduler: Any, timesteps: Any) -> bool:
        """Whether a scheduler hands out the same timesteps in another tensor at every look: that starts no run."""
        if self._timesteps is None or scheduler is None or scheduler.timesteps is timesteps:
            return False
        return [*map(float, timesteps)] == [*map(float, self._timesteps)]

    def follow(self, scheduler: Any) -> None:
        """Start a run on `scheduler`'s timesteps, if they are the schedules'."""
        timesteps = tuple(map(float, torch.as_tensor(scheduler.timesteps).tolist()))  # one wait, if on a device
        name = type(scheduler).__name__
        if len(timesteps) != self.steps:
            unset = getattr(scheduler, "num_inference_steps", 0) is None and scheduler is self.scheduler()
            raise ValueError(
                f"the schedule has {self.steps} steps, but {name} has {len(timesteps)} timesteps"
                f"{self.owner() if unset else ''}"
            )
        for schedule in self.schedules:
            self._check(schedule, name, timesteps)
        self.tracker.timesteps = timesteps
        self.end_run(entry=getattr(scheduler, "begin_index", None) or 0)

    def _check(self, schedule: Schedule, name: str, timesteps: tuple[float, ...]) -> None:
        if schedule.timesteps is not None and not np.allclose(timesteps, schedule.timesteps, rtol=1e-5, atol=1e-6):
            step = int(np.argmin(np.isclose(timesteps, schedule.timesteps, rtol=1e-5, atol=1e-6)))
            raise ValueError(
                f"timesteps differ: at step {step} the schedule has {schedule.timesteps[step]:g}, "
                f"{name} has {timesteps[step]:g}"
            )
        if schedule.sampler not in (None, name) and name not in self._warned:
            message = f"the schedule was made for {schedule.sampler}, the pipeline samples with {name}"
            if self.strict:
                raise ValueError(message)
            self._warned.add(name)
            warnings.warn(message, stacklevel=6)

    def told(self) -> int | None:
        """The step a pipeline's scheduler is at, by its own count; None without one, or if it counts none."""
        scheduler = self.scheduler()
        if scheduler is None or not hasattr(scheduler, "step_index"):
            return None
        index = scheduler.step_index
        return (getattr(scheduler, "begin_index", None) or 0) if index is None else int(index)

    def owner(self) -> str:
        """What to do about a call that does not follow from those of the pipeline the denoisers were compiled for."""
        if (scheduler := self.scheduler()) is None:
            return ""
        pipeline = self.pipeline()
        owner = "pipeline" if pipeline is None else type(pipeline).__name__
        return (
            f"; these are the steps of the {type(scheduler).__name__} of the {owner} that this transformer was "
            "compiled for: for another pipeline with a scheduler of its own call harmonica_rt.compile(it, schedule)"
        )
