"""One run of a hard schedule as a function of its reuse weights: differentiable, the runtime's results."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harmonica_rt.forecast import forecast, history
from harmonica_rt.layout import trunk_beside
from harmonica_rt.schedule import Schedule

from .denoiser import Evaluate
from .task import Trajectory

TIES = ("none", "branch", "step")


class ReuseWeights:
    """What a schedule's reused entries and outputs stand on, as changes of the schedule's own weights.

    Args:
        schedule: which values exist at each entry; its weights are the start.
        tie: "none": a change of its own for each step, layer and branch; "branch": layers share; "step": all share.
            Outputs and the trunk have their own, one for each step and value.

    Attributes:
        change: [n], the changes, 0 at first; to be learned.
    """

    def __init__(self, schedule: Schedule, tie: str = "none", device: torch.device | str = "cpu") -> None:
        if tie not in TIES:
            raise ValueError(f"tie: expected one of {TIES}, got {tie!r}")
        self.schedule = schedule
        exists = history(schedule.compute, schedule.order) >= 0
        free = exists & ~(schedule.compute | schedule.left_alone)[..., None]
        free = free.reshape(schedule.steps, -1, schedule.order + 1)  # [T, entries, values]
        output_exists = history(~schedule.output[:, None, None], schedule.order)[:, 0, 0] >= 0
        output_free = output_exists & schedule.output[:, None]
        # Where each weight's change stands: weights that share one have the same number, others none
        number = np.arange(free.size).reshape(free.shape)
        if tie != "none":
            _, layers, kinds = schedule.groups[0]
            own = number[:, : layers * len(kinds)].reshape(schedule.steps, layers, len(kinds), -1)
            tied = np.broadcast_to(own[:, :1, : 1 if tie == "step" else None], own.shape)
            number[:, : layers * len(kinds)] = tied.reshape(schedule.steps, layers * len(kinds), -1)
        number = np.concatenate([number[free], free.size + np.flatnonzero(output_free)])
        names, index = np.unique(number, return_inverse=True)
        if not len(names):
            raise ValueError("expected a schedule that reuses something, got one that computes everything")
        places = np.full(free.size + output_free.size, len(names))  # the last one is a change of 0
        places[np.concatenate([free.reshape(-1), output_free.reshape(-1)])] = index
        start = np.concatenate([schedule.weights.reshape(-1), schedule.output_weights.reshape(-1)])
        self.places = torch.tensor(places, device=device)
        self.start = torch.tensor(start, dtype=torch.float64, device=device)
        self.change = torch.zeros(len(names), device=device)

    def __call__(self, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights of entries [T, entries, order + 1, images] and of outputs [T, order + 1, images].

        Args:
            change: in place of `change`; [n] (images is 1), or [images, n], each image with its own.
        """
        change = torch.atleast_2d(self.change if change is None else change)
        change = torch.cat([change, change.new_zeros(len(change), 1)], dim=1)
        weights = (self.start.to(change.dtype) + change[:, self.places]).T
        split, steps, values = self.schedule.weights.size, self.schedule.steps, self.schedule.order + 1
        return (
            weights[:split].view(steps, self.schedule.weights.size // (steps * values), values, -1),
            weights[split:].view(steps, values, -1),
        )

    def to_schedule(self, change: Tensor | None = None) -> Schedule:
        """The schedule with its weights as they are now, or with `change` [n] in place of theirs."""
        change = self.change if change is None else change
        weights, outputs = (w.detach()[..., 0].cpu().numpy() for w in self(change.double()))
        return self.schedule.replace(weights=weights.reshape(self.schedule.weights.shape), output_weights=outputs)


class Reusing:
    """One run of a hard schedule, differentiable in its weights and in the sample.

    Args:
        weights: as `ReuseWeights` gives them.
        checkpointing: keep one step's activations only, and recompute the others in the backward pass.
    """

    def __init__(self, schedule: Schedule, weights: tuple[Tensor, Tensor], checkpointing: bool = False) -> None:
        self.compute = schedule.compute.reshape(schedule.steps, -1)
        self.trunk = None
        if trunk_beside(schedule.groups):  # its values are the stream after it and, as of one entry more, before it
            unlearned = forecast(self.compute[:, -1], schedule.order, schedule.positions)
            self.trunk = schedule.carry[:, -1].tolist(), torch.tensor(unlearned, dtype=torch.float32)[..., None]
            self.compute = np.concatenate([self.compute, self.compute[:, -1:]], axis=1)
        self.output, self.order = schedule.output, schedule.order
        self.weights, self.output_weights = weights
        self.checkpointing = checkpointing
        self.values: list[tuple[Tensor, ...]] = [()] * self.compute.shape[1]  # newest first
        self.outputs: tuple[Tensor, ...] = ()

    def run(self, run: Trajectory) -> Tensor:
        """The sampler's result."""
        while not run.done:
            run.advance(self.denoise(run))
        return run.x

    def denoise(self, run: Trajectory) -> Tensor:
        """The guided output of the run's next step."""
        if self.output[run.step]:
            return _sum(self.outputs, self.output_weights[run.step])
        arguments = run, run.step, run.model_input(), self.weights[run.step], tuple(self.values)
        if self.checkpointing and torch.is_grad_enabled():
            output, *fresh = checkpoint(self._step, *arguments, use_reentrant=False)
        else:
            output, *fresh = self._step(*arguments)
        for entry, value in zip(np.flatnonzero(self.compute[run.step]), fresh, strict=True):
            self.values[entry] = (value, *self.values[entry])[: self.order + 1]
        self.outputs = (output, *self.outputs)[: self.order + 1]
        return output

    def _step(
        self, run: Trajectory, step: int, x: Tensor, weights: Tensor, values: tuple[tuple[Tensor, ...], ...]
    ) -> list[Tensor]:
        computed, fresh = self.compute[step], []
        rows = weights.unbind()

        def stand_in(entry: int, evaluate: Evaluate) -> Tensor:
            if not computed[entry]:
                return _sum(values[entry], rows[entry])
            fresh.append(evaluate())
            return fresh[-1]

        def trunk(before: Tensor, run_branches: Evaluate) -> Tensor:
            entry = len(computed) - 2
            if computed[entry]:
                after = run_branches()
                fresh.extend((after, before))
                return after
            after, carry = _sum(values[entry], rows[entry]), self.trunk[0][step]
            if carry:
                after = after + carry * (before - _sum(values[entry + 1], self.trunk[1][step].to(before.device)))
            return after

        return [run.output(step, x, stand_in, None if self.trunk is None else trunk), *fresh]


def _sum(values: tuple[Tensor, ...], weights: Tensor) -> Tensor:
    """Weights [order + 1, images or 1]; a value's first dimension is images, or twice that with guidance."""
    rest = [1] * (values[0].dim() - 1)
    rows = [w.repeat(len(values[0]) // len(w)).view(-1, *rest) for w in weights.unbind()]
    total = rows[0] * values[0]
    for row, value in zip(rows[1:], values[1:]):
        total = torch.addcmul(total, row, value)
    return total.to(values[0].dtype)


@torch.no_grad()
def reusing_run(schedule: Schedule, run: Trajectory) -> Tensor:
    """The sampler's result with the schedule's own weights."""
    device = run.x.device
    weights, outputs = (
        torch.tensor(w, dtype=torch.float32, device=device)[..., None]
        for w in (schedule.weights.reshape(schedule.steps, -1, schedule.order + 1), schedule.output_weights)
    )
    return Reusing(schedule, (weights, outputs)).run(run)
