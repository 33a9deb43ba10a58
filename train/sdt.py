"""The two objectives of a router on one batch: SDT (HarmoniCa, section 4.1) and L2C, the baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import compute
from .mixing import Mixing
from .router import TAU, Router
from .task import Batch, Task, Trajectory


@dataclass(frozen=True)
class Gating:
    """What the cache takes and holds while training.

    Attributes:
        tau: it takes the mixed value where r > tau.
        order: cached values are extrapolated from order + 1.
    """

    tau: float = TAU
    order: int = 0


@dataclass(frozen=True)
class StepLoss:
    """The error of one step's student; `mse` has the graph back to the gates of `step` alone."""

    step: int
    mse: Tensor
    gates: Tensor


def pinned_steps(steps: int, objective: str) -> tuple[int, ...]:
    """Steps that always compute: the first; for L2C also those whose number in the papers, k = T-1-i, is odd."""
    return tuple(i for i in range(steps) if i == 0 or (objective == "l2c" and (steps - 1 - i) % 2))


def sdt(task: Task, router: Router, gating: Gating, batch: Batch) -> Iterator[StepLoss]:
    """One iteration of step-wise denoising training: a whole trajectory, one loss for each step after the first.

    Teacher and student share x_i; the student's output gives x_{i+1}. The caller does its optimiser step on Z_i when
    it is handed the loss: gates, cache and x have been read before.
    """
    run = Trajectory(task, batch)
    mixing = Mixing(task.denoiser.entries, gating.order, task.steps)
    with torch.no_grad():
        run.advance(run.denoise(mixing.compute(0)))
    while not run.done:
        step = run.step
        with torch.no_grad():
            teacher = run.denoise(compute)
        gates = router.gates(step)
        student = run.denoise(mixing.mix(step, gates, router.kept(step, gating.tau)))
        with torch.no_grad():
            run.advance(student.detach())
        yield StepLoss(step, mse(student, teacher), gates)


def l2c(task: Task, router: Router, gating: Gating, batch: Batch, images: Tensor, seed: int) -> Iterator[StepLoss]:
    """One loss of Learning-to-Cache: the step before a random one that may cache is computed and fills the cache.

    Args:
        images: real samples [count, channels, height, width] in the model's range.
        seed: of the step. The forward process's noise is the batch's.
    """
    generator = torch.Generator().manual_seed(seed)
    may = sorted(set(range(task.steps)) - set(router.pinned))
    step = may[int(torch.randint(len(may), (), generator=generator))]
    run = Trajectory(task, batch, first=step - 1)
    mixing = Mixing(task.denoiser.entries, gating.order, task.steps)
    run.x = run.scheduler.add_noise(images, batch.noise, run.scheduler.timesteps[step - 1].expand(len(images)))
    with torch.no_grad():
        run.advance(run.denoise(mixing.compute(step - 1)))
        teacher = run.denoise(compute)
    gates = router.gates(step)
    student = run.denoise(mixing.mix(step, gates, router.kept(step, gating.tau)))
    yield StepLoss(step, mse(student, teacher), gates)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean over samples, channels and pixels, in fp32."""
    return (a.float() - b.float()).square().mean()


@torch.no_grad()
def run_router(task: Task, router: Router, gating: Gating, batch: Batch, visit: Callable | None = None) -> Tensor:
    """The sampler's result [count, channels, height, width] with the router's gates as they are now.

    `visit(run, mixing)` is called before each step after the first.
    """
    run = Trajectory(task, batch)
    mixing = Mixing(task.denoiser.entries, gating.order, task.steps)
    run.advance(run.denoise(mixing.compute(0)))
    finish(run, mixing, router, gating, visit)
    return run.x


@torch.no_grad()
def finish(run: Trajectory, mixing: Mixing, router: Router, gating: Gating, visit: Callable | None = None) -> Tensor:
    """The rest of a run by the router's gates."""
    while not run.done:
        if visit is not None:
            visit(run, mixing)
        gates, kept = router.gates(run.step).detach(), router.kept(run.step, gating.tau)
        run.advance(run.denoise(mixing.mix(run.step, gates, kept)))
    return run.x
