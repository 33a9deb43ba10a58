"""IEPO's lambda: how much caching at a step moves the image (HarmoniCa, section 4.2; METHOD: IEPO).

Three estimators, all without gradients on one batch:
    leave-one-out   lambda_i = || x_end - x_end^(i) ||^2, the run in which step i alone computes everything (the paper)
    telescoping     lambda_i = || y_i - y_{i-1} ||^2, y_i: steps 0..i by the router, later ones computed (its code)
    gain            leave-one-out over the student's error at step i: independent of how much step i caches now
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .denoiser import compute
from .mixing import Mixing
from .router import Router
from .sdt import Gating, finish, mse
from .task import Batch, Task, Trajectory

ESTIMATORS = ("none", "leave-one-out", "telescoping", "gain")


def image_errors(
    task: Task, router: Router, gating: Gating, batch: Batch, estimator: str, rank: int = 0, ranks: int = 1
) -> Tensor:
    """One estimate of lambda, float64 [T]; lambda_0 is 0 and unused; NaN where a gain is not defined (no error).

    Args:
        rank, ranks: which of so many processes this is. Each runs its share of the T trajectories and leaves zeros
            for the others: the sum over processes is the estimate.
    """
    if estimator not in ESTIMATORS[1:]:
        raise ValueError(f"estimator: expected one of {ESTIMATORS[1:]}, got {estimator!r}")
    return (_telescoping if estimator == "telescoping" else _leave_one_out)(
        task, router, gating, batch, estimator == "gain", rank, ranks
    )


@torch.no_grad()
def _leave_one_out(
    task: Task, router: Router, gating: Gating, batch: Batch, gain: bool, rank: int, ranks: int
) -> Tensor:
    out = torch.zeros(task.steps, dtype=torch.float64)
    run = Trajectory(task, batch)
    mixing = Mixing(task.denoiser.entries, gating.order, task.steps)
    run.advance(run.denoise(mixing.compute(0)))
    ends, errors = {}, {}
    while not run.done:
        step = run.step
        other = run.fork(), mixing.fork()  # up to here the two runs are one
        output = run.denoise(mixing.mix(step, router.gates(step).detach(), router.kept(step, gating.tau)))
        if step % ranks == rank:
            branch, cache = other
            exact = branch.denoise(cache.compute(step))
            errors[step] = mse(output, exact).item()
            branch.advance(exact)
            ends[step] = finish(branch, cache, router, gating)
        run.advance(output)
    for step, end in ends.items():
        out[step] = squared_norm(run.x - end)
        if gain:
            out[step] = out[step] / errors[step] if errors[step] > 0 else torch.nan
    return out


@torch.no_grad()
def _telescoping(task: Task, router: Router, gating: Gating, batch: Batch, gain: bool, rank: int, ranks: int) -> Tensor:
    out = torch.zeros(task.steps, dtype=torch.float64)
    run = Trajectory(task, batch)
    mixing = Mixing(task.denoiser.entries, gating.order, task.steps)
    run.advance(run.denoise(mixing.compute(0)))
    ends = {}
    while True:
        last = run.step - 1
        if last % ranks == rank or (last + 1) % ranks == rank:
            rest = run.fork()
            while not rest.done:
                rest.advance(rest.denoise(compute))
            ends[last] = rest.x
        if run.done:
            break
        step = run.step
        run.advance(run.denoise(mixing.mix(step, router.gates(step).detach(), router.kept(step, gating.tau))))
    for step in range(1, task.steps):
        if step % ranks == rank:
            out[step] = squared_norm(ends[step] - ends[step - 1])
    return out


def squared_norm(difference: Tensor) -> float:
    """|| . ||^2 of each sample, averaged over the batch."""
    return difference.double().square().flatten(1).sum(1).mean().item()


@dataclass
class Lambda:
    """Lambda between refreshes: smoothed, bounded, with mean 1 over the steps after the first.

    With few trajectories an estimate swings by orders of magnitude: a step that caches nothing gets 0 and then caches
    everything.

    Args:
        steps: T.
        smoothing: share of the old value that stays at a refresh, on a log scale.
        bound: estimates are clamped to [1 / bound, bound] of their mean; values then differ by bound^2 at most.
        normalise: mean 1, so that beta means the same on every model. Off: the estimate as it is.
    """

    steps: int
    smoothing: float = 0.5
    bound: float = 1e4
    normalise: bool = True
    values: Tensor | None = None

    def __getitem__(self, step: int) -> float:
        return 1.0 if self.values is None else self.values[step].item()

    def update(self, estimate: Tensor) -> None:
        """Take an estimate [T]; where it is NaN, what its neighbours suggest: gains change smoothly along the run."""
        new = _filled(estimate)
        if self.normalise:
            new = new / new[1:].mean() if new[1:].mean() > 0 else torch.ones_like(new)
            new = new.clamp(1 / self.bound, self.bound)
            if self.values is not None:
                new = torch.exp(self.smoothing * self.values.log() + (1 - self.smoothing) * new.log())
            new = new / new[1:].mean()
        new[0] = 1.0
        self.values = new

    @property
    def range(self) -> tuple[float, float]:
        return (1.0, 1.0) if self.values is None else (self.values[1:].min().item(), self.values[1:].max().item())


def _filled(estimate: Tensor) -> Tensor:
    """NaNs replaced: log-linear between the steps that have a value, the nearest one's at the ends."""
    values = estimate.numpy()
    known = np.flatnonzero(values > 0)
    if not np.isnan(values).any():
        return estimate.clone()
    if len(known) == 0:
        return torch.ones_like(estimate)
    between = np.exp(np.interp(np.arange(len(values)), known, np.log(values[known])))
    return torch.from_numpy(np.where(np.isnan(values), between, values))
