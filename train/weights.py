"""Reuse weights of a hard schedule, learned on the end error (METHOD: Beyond the papers).

Which entries are computed is fixed; what stands in for the others, o = sum_k a_k c_k, starts at the forecast and
follows the gradient of log ||x_end - target||^2 through the whole run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harmonica_rt.forecast import history
from harmonica_rt.schedule import Schedule

from .denoiser import Evaluate, compute
from .stopping import stopping
from .task import Batch, Task, Trajectory
from .trainer import TRAIN_SEED, LossNotFinite

TIES = ("none", "branch", "step")
TARGETS = ("full", "converged")
DETERMINISTIC = ("DDIMScheduler", "DPMSolverMultistepScheduler")
CONVERGED_STEPS = 100  # of DPM-Solver++


class ReuseWeights(nn.Module):
    """What a schedule's reused branches and outputs stand on, as parameters: corrections of the schedule's own weights.

    Args:
        schedule: which values exist at each entry; its weights are the start.
        tie: "none": a weight of its own for each step, layer and branch; "branch": layers share; "step": all share.
    """

    def __init__(self, schedule: Schedule, tie: str = "none") -> None:
        super().__init__()
        if tie not in TIES:
            raise ValueError(f"tie: expected one of {TIES}, got {tie!r}")
        self.schedule = schedule
        exists = history(schedule.compute, schedule.order) >= 0
        free = exists & ~schedule.compute[..., None] & ~schedule.output[:, None, None, None]
        self.register_buffer("start", torch.tensor(schedule.weights, dtype=torch.float32))
        self.register_buffer("free", torch.tensor(free, dtype=torch.float32))
        steps, layers, branches, values = self.start.shape
        shape = (steps, layers if tie == "none" else 1, branches if tie != "step" else 1, values)
        self.change = nn.Parameter(torch.zeros(shape))
        outputs = history(~schedule.output[:, None, None], schedule.order)[:, 0, 0] >= 0
        self.register_buffer("output_start", torch.tensor(schedule.output_weights, dtype=torch.float32))
        self.register_buffer("output_free", torch.tensor(outputs & schedule.output[:, None], dtype=torch.float32))
        self.output_change = nn.Parameter(torch.zeros(steps, values))
        self.change.requires_grad_(bool(free.any()))
        self.output_change.requires_grad_(bool(schedule.output.any()))
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError("expected a schedule that reuses something, got one that computes everything")

    def forward(self) -> tuple[Tensor, Tensor]:
        """([T, L B, order + 1], [T, order + 1]): weights of branches and of outputs."""
        branches = self.start + self.change * self.free
        return branches.flatten(1, 2), self.output_start + self.output_change * self.output_free

    @torch.no_grad()
    def to_schedule(self, **changes: object) -> Schedule:
        branches, outputs = self()
        weights = branches.view(self.start.shape).cpu().double().numpy()
        return self.schedule.replace(weights=weights, output_weights=outputs.cpu().double().numpy(), **changes)


class Reusing:
    """One run of a hard schedule, differentiable in its weights and in the sample.

    Args:
        weights: as `ReuseWeights` gives them.
        checkpointing: keep one step's activations only, and recompute the others in the backward pass.
    """

    def __init__(self, schedule: Schedule, weights: tuple[Tensor, Tensor], checkpointing: bool = False) -> None:
        self.compute = schedule.compute.reshape(schedule.steps, -1)
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
            return _sum(self.outputs, self.output_weights[run.step].unbind())
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
        rows = [row.unbind() for row in weights.unbind()]

        def stand_in(entry: int, evaluate: Evaluate) -> Tensor:
            if not computed[entry]:
                return _sum(values[entry], rows[entry])
            fresh.append(evaluate())
            return fresh[-1]

        return [run.output(step, x, stand_in), *fresh]


def _sum(values: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:]):
        total = torch.addcmul(total, weight, value)
    return total


@dataclass(frozen=True)
class WeightSettings:
    """How to learn reuse weights.

    Attributes:
        target: "full": the same sampler's run without reuse; "converged": DPM-Solver++ with 100 steps.
        iterations: optimiser steps; the learning rate falls to 0 over them (cosine).
        minutes: time to stop after, if that comes first; the learning rate then follows the time.
        batch: runs an iteration, over all processes.
        accumulate: backward passes an iteration is split into.
        pool: starts that are drawn once; their targets are computed once each.
        lr: of Adam.
        tie: as in `ReuseWeights`.
        checkpointing: as in `Reusing`.
        seed: of the starts.
    """

    target: str = "full"
    iterations: int = 100
    minutes: float | None = None
    batch: int = 12
    accumulate: int = 1
    pool: int = 192
    lr: float = 0.03
    tie: str = "none"
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target: expected one of {TARGETS}, got {self.target!r}")
        for name in ("iterations", "batch", "accumulate", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.pool < self.batch:
            raise ValueError(f"pool: expected at least a batch of {self.batch}, got {self.pool}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch: expected a multiple of {self.accumulate} parts, got {self.batch}")


@dataclass(frozen=True)
class WeightProgress:
    """After an iteration: mean over its runs of 10 log10 of the mean squared end error; share of the budget spent."""

    iteration: int
    seconds: float
    decibels: float
    share: float


class WeightTrainer:
    """Learns the reuse weights of a schedule.

    Args:
        schedule: for the task's model and sampler; its weights are the start.
    """

    def __init__(
        self, task: Task, schedule: Schedule, settings: WeightSettings, accelerator: Accelerator | None = None
    ) -> None:
        self.task, self.settings = task, settings
        check_schedule(task, schedule)
        self.accelerator = accelerator or Accelerator(cpu=task.device.type == "cpu")
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        if settings.batch % (self.ranks * settings.accumulate):
            raise ValueError(
                f"batch: expected a multiple of {self.ranks} processes x {settings.accumulate} parts, "
                f"got {settings.batch}"
            )
        self.weights = ReuseWeights(schedule, settings.tie).to(task.device)
        self.optimizer = torch.optim.Adam(self._learned(), lr=settings.lr)
        self.target = task if settings.target == "full" else converged(task)
        self.starts = task.draw(settings.pool, TRAIN_SEED + settings.seed * 1_000_003)
        self.ends: dict[tuple[int, int], Tensor] = {}
        self.iteration, self.seconds = 0, 0.0

    def run(self, on_progress: Callable[[WeightProgress], None] | None = None) -> Schedule:
        """Learn to the end of the budget, or until SIGINT or SIGTERM; the schedule with its weights.

        Raises:
            LossNotFinite: the weights diverged. `weights` is as it was before that step.
        """
        with stopping() as stopped:
            while (share := self._share()) < 1 and not stopped():
                began = time.perf_counter()
                decibels = self._iterate(share)
                self.iteration += 1
                self.seconds += time.perf_counter() - began
                if on_progress is not None and self.accelerator.is_main_process:
                    on_progress(WeightProgress(self.iteration, self.seconds, decibels, self._share()))
        return self.schedule()

    def _learned(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.weights.parameters() if parameter.requires_grad]

    def _share(self) -> float:
        """How much of the budget is spent."""
        settings, share = self.settings, self.iteration / self.settings.iterations
        if settings.minutes is not None:
            spent = torch.tensor(self.seconds / (60 * settings.minutes))
            share = max(share, (self.accelerator.reduce(spent, "mean") if self.ranks > 1 else spent).item())
        return share

    def _iterate(self, share: float) -> float:
        settings, losses = self.settings, []
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        for batch, end in self._parts():
            with self.accelerator.autocast():
                reusing = Reusing(self.weights.schedule, self.weights(), settings.checkpointing)
                result = reusing.run(Trajectory(self.task, batch))
            error = (result.float() - end).square().mean((1, 2, 3))
            loss = (error + 1e-12).log().mean()
            (loss / settings.accumulate).backward()
            losses.append(loss.item())
        for parameter in self._learned():
            if self.ranks > 1:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            if not parameter.grad.isfinite().all():
                self.optimizer.zero_grad(set_to_none=True)
                raise LossNotFinite(f"iteration {self.iteration}: the gradient is not finite (loss {losses})")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return 10 / math.log(10) * float(np.mean(losses))

    def _parts(self) -> Iterator[tuple[Batch, Tensor]]:
        """This process's runs of the iteration, with their targets."""
        settings = self.settings
        whole = settings.pool // settings.batch
        size = settings.batch // settings.accumulate // self.ranks
        for part in range(settings.accumulate):
            start = (self.iteration % whole) * settings.batch + (part * self.ranks + self.rank) * size
            batch = self.starts.part(start, start + size)
            if (start, size) not in self.ends:
                with self.accelerator.autocast():
                    self.ends[start, size] = full_run(self.target, batch).float()
            yield batch, self.ends[start, size]

    def schedule(self, **changes: object) -> Schedule:
        return self.weights.to_schedule(**changes)


@torch.no_grad()
def full_run(task: Task, batch: Batch) -> Tensor:
    """The sampler's result without reuse."""
    run = Trajectory(task, batch)
    while not run.done:
        run.advance(run.denoise(compute))
    return run.x


def converged(task: Task, steps: int = CONVERGED_STEPS) -> Task:
    """The same model and guidance with a sampler that has as good as converged: DPM-Solver++ with many steps.

    Raises:
        ValueError: the task's sampler draws noise, so that no other sampler shares its solution.
    """
    from diffusers import DPMSolverMultistepScheduler

    name, config = type(task.scheduler).__name__, task.scheduler.config
    if name not in DETERMINISTIC or str(config.get("algorithm_type", "")).startswith("sde"):
        raise ValueError(f"target converged: expected a deterministic sampler of {DETERMINISTIC}, got {name}")
    kept = {k: config[k] for k in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")}
    scheduler = DPMSolverMultistepScheduler(**kept, prediction_type=config["prediction_type"])
    return task.with_sampler(scheduler, steps)


def check_schedule(task: Task, schedule: Schedule) -> None:
    """Raise ValueError unless `schedule` is for the task's model and sampler."""
    task.adapter.check_schedule(schedule)
    fields = task.fields()
    for what, expected, got in [
        ("steps", task.steps, schedule.steps),
        ("sampler", fields["sampler"], schedule.sampler),
        ("timesteps", tuple(map(float, fields["timesteps"])), schedule.timesteps),
    ]:
        if got is not None and expected != got:
            raise ValueError(f"schedule does not fit the task: {what} expected {expected}, got {got}")
