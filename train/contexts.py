"""Schedules that are learned together: one for all contexts of a step, or one each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from harmonica_rt.compiled import Schedules
from harmonica_rt.schedule import Schedule

from .reuse import Numbers, ReuseWeights, fixed

T = TypeVar("T")
CONTEXTS = ("shared", "own")
NumbersOf = Callable[[Hashable], Numbers]  # context -> a whole run's


def every(own: T | Mapping[str, T]) -> list[T]:
    return [*own.values()] if isinstance(own, Mapping) else [own]


def check_schedules(name: str, own: Any) -> None:
    if not every(own) or not all(isinstance(one, Schedule) for one in every(own)):
        raise TypeError(f"{name}: expected a Schedule, or one by context, got {own!r}")


def each(own: T | Mapping[str, T], make: Callable[[T], Any]) -> Any:
    """What `make` makes of the one there is, or by context of each."""
    if isinstance(own, Mapping):
        return {context: make(one) for context, one in own.items()}
    return make(own)


def numbers_of(made: Any) -> NumbersOf:
    """By context: one schedule's `Numbers`, or those of each."""
    return lambda context: made[context] if isinstance(made, Mapping) else made


def own_numbers(schedules: Schedules, device: torch.device) -> NumbersOf:
    """The schedules' own."""
    return numbers_of(each(schedules, lambda schedule: fixed(schedule, device)))


def noted(schedules: Schedules, note: str) -> Schedules:
    """The same with `note`, which says of each context's that it is."""
    if not isinstance(schedules, Mapping):
        return schedules.replace(note=note)
    return {
        context: own.replace(note=f"{note}; own weights of context {context}, of {' and '.join(schedules)}")
        for context, own in schedules.items()
    }


def files_of(schedules: Schedules, out: Path) -> dict[Path, Schedule]:
    """Where `out` is for one schedule: OUT, or OUT-cond and OUT-uncond beside each other."""
    if not isinstance(schedules, Mapping):
        return {out: schedules}
    return {out.with_stem(f"{out.stem}-{context}"): own for context, own in schedules.items()}


def save(schedules: Schedules, out: Path) -> None:
    """Write `files_of` them."""
    for path, schedule in files_of(schedules, out).items():
        schedule.save(path)


class ContextWeights:
    """`ReuseWeights` of one schedule, or of each context's, as one flat change to be learned.

    Args:
        arguments: of each `ReuseWeights`.

    Attributes:
        schedules: whose weights these are.
        change: [n], the changes context by context, 0 at first; to be learned.
    """

    def __init__(self, schedules: Schedules, *arguments: Any, **more: Any) -> None:
        self.schedules = schedules
        self.own = each(schedules, lambda schedule: ReuseWeights(schedule, *arguments, **more))
        self.change = torch.cat([weights.change for weights in every(self.own)])

    def __call__(self, change: Tensor | None = None) -> NumbersOf:
        """The weights of each context, differentiable.

        Args:
            change: in place of `change`; [n], or [images, n], each image with its own.
        """
        return numbers_of(self._each(lambda weights, own: weights(own), change))

    def to_schedule(self, change: Tensor | None = None) -> Schedules:
        """The schedules with their weights as they are now, or with `change` [n] in place of theirs."""
        return self._each(lambda weights, own: weights.to_schedule(own), change)

    def _each(self, make: Callable[[ReuseWeights, Tensor], Any], change: Tensor | None) -> Any:
        change = self.change if change is None else change
        parts = iter(change.split([len(weights.change) for weights in every(self.own)], dim=-1))
        return each(self.own, lambda weights: make(weights, next(parts)))
