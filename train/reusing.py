"""One run of a hard schedule as a function of its weights: differentiable, the runtime's results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harmonica_rt.layout import trunk_beside
from harmonica_rt.schedule import Schedule

from .denoiser import Evaluate, StandIn, TrunkStandIn
from .reuse import Numbers, anything, combined, fixed, over
from .task import Trajectory

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


class Reusing:
    """One run of a hard schedule, differentiable in its weights and in the sample.

    Args:
        numbers: as `ReuseWeights` gives them.
        checkpointing: one of `CHECKPOINTS`: what is not kept is recomputed in the backward pass. Here blocks is steps.
    """

    def __init__(self, schedule: Schedule, numbers: Numbers, checkpointing: str = "none") -> None:
        self.schedule, self.numbers, self.checkpointing = schedule, numbers, checkpointing
        self.kept = Kept(((),) * schedule.compute.reshape(schedule.steps, -1).shape[1])
        self.outputs: tuple[Tensor, ...] = ()

    def run(self, run: Trajectory) -> Tensor:
        """The sampler's result."""
        while not run.done:
            run.advance(self.denoise(run))
        return run.x

    def denoise(self, run: Trajectory) -> Tensor:
        """The guided output of the run's next step."""
        step, order = run.step, self.schedule.order
        if self.schedule.output[step]:
            return combined(self.outputs, self.numbers.output_rows(step), axis=1)
        branches = Branches(self.schedule, step, self.numbers, self.kept)

        def forward(x: Tensor, stand_in: StandIn) -> list[Tensor]:
            branches.fresh = []
            return [run.output(step, x, stand_in, branches.trunk), *branches.fresh]

        if self.checkpointing != "none" and torch.is_grad_enabled():
            output, *fresh = checkpoint(forward, run.model_input(), branches, use_reentrant=False)
        else:
            output, *fresh = forward(run.model_input(), branches)
        self.kept, self.outputs = branches.keep(fresh, order), (output, *self.outputs)[: order + 1]
        return output


@torch.no_grad()
def reusing_run(schedule: Schedule, run: Trajectory) -> Tensor:
    """The sampler's result with the schedule's own weights."""
    return Reusing(schedule, fixed(schedule, run.x.device)).run(run)
