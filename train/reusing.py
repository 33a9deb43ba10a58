"""What stands in for branches and streams that are reused, as a function of weights: differentiable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from harmonica_rt.layout import trunk_beside
from harmonica_rt.schedule import Schedule

from .denoiser import Evaluate, TrunkStandIn
from .reuse import Numbers, anything, combined, over

CHECKPOINTS = ("none", "steps", "blocks")  # what is kept of a run's activations: all, one step's, one block's of a step


@dataclass(frozen=True)
class Kept:
    """The values that a step's branches may reuse, newest first. Never changed.

    Attributes:
        entries: of each entry its values.
        befores: the stream before the trunk, where it is an entry beside branches.
    """

    entries: tuple[tuple[Tensor, ...], ...]
    befores: tuple[Tensor, ...] = ()


class Branches:
    """What stands in for the branches of one step, and for the trunk; what was computed is collected in `fresh`."""

    def __init__(self, schedule: Schedule, step: int, numbers: Numbers, kept: Kept) -> None:
        self.computed = schedule.compute.reshape(schedule.steps, -1)[step]
        self.step, self.numbers, self.kept = step, numbers, kept
        self.has_trunk = trunk_beside(schedule.groups)
        self.fresh: list[Tensor] = []

    def __call__(self, entry: int, evaluate: Evaluate) -> Tensor:
        if not self.computed[entry]:
            return combined(self.kept.entries[entry], self.numbers.rows(self.step, entry))
        self.fresh.append(evaluate())
        return self.fresh[-1]

    @property
    def trunk(self) -> TrunkStandIn | None:
        return self._trunk if self.has_trunk else None

    def _trunk(self, before: Tensor, run_branches: Evaluate) -> Tensor:
        entry = len(self.computed) - 1
        if self.computed[entry]:
            after = run_branches()
            self.fresh += [after, before]
            return after
        return carried(self.numbers, self.step, entry, self.kept.entries[entry], self.kept.befores, before)

    def keep(self, fresh: list[Tensor], order: int) -> Kept:
        """What the next step may reuse, `fresh` being what this one computed."""
        fresh, entries = list(fresh), list(self.kept.entries)
        befores = self.kept.befores
        if self.has_trunk and self.computed[-1]:
            befores = (fresh.pop(), *befores)[: order + 1]
        for entry, value in zip(np.flatnonzero(self.computed), fresh, strict=True):
            entries[entry] = (value, *entries[entry])[: order + 1]
        return Kept(tuple(entries), befores)


def carried(
    numbers: Numbers,
    step: int,
    entry: int,
    values: tuple[Tensor, ...],
    befores: tuple[Tensor, ...],
    now: Tensor | None,
    axis: int = -1,
) -> Tensor:
    """What stands in for a stream after a group: sum a_k h_k + c (x - sum w_k x_k) (METHOD: the carry).

    Args:
        values, befores: h and x of computed steps, newest first.
        now: x of this step; read, as `befores` are, only where there is a carry.
    """
    after, carry = combined(values, numbers.rows(step, entry), axis), numbers.carry_row(step, entry)
    if now is None or not anything(carry):
        return after
    unlearned = numbers.unlearned[step, entry].to(now.device)
    fresh = now - combined(befores, [w[None] for w in unlearned], axis)
    return (after + over(carry, now, axis) * fresh).to(after.dtype)
