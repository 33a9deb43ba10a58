"""Learning a router on Hugging Face Accelerate: one process, several GPUs, or CPUs with gloo."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from harmonica_rt.schedule import Schedule

from . import checkpoint
from .budget import Beta, Budget, describe, macs
from .iepo import ESTIMATORS, Lambda, image_errors
from .router import TAU, Router, check_tau
from .sdt import Gating, StepLoss, l2c, pinned_steps, sdt
from .stopping import stopping
from .task import Batch, Task

OBJECTIVES = ("sdt", "l2c")
# Training's noises are apart from those anyone is likely to evaluate on, and lambda's from the batches'
TRAIN_SEED, IEPO_SEED, STEP_SEED = 1 << 40, 1 << 41, 1 << 42


class LossNotFinite(FloatingPointError):
    """Training met a NaN or an infinity. The last good checkpoint is untouched."""


@dataclass(frozen=True)
class Settings:
    """How to learn. The defaults are what worked best in train/STUDY.md; `paper()` is as published.

    Attributes:
        objective: "sdt" or "l2c".
        estimator: of lambda: "leave-one-out", "telescoping", "gain" or "none" (lambda 1).
        refresh: iterations between estimates of lambda, C.
        lambda_batch: runs an estimate averages over.
        smoothing, bound, normalise: as in `Lambda`.
        beta: weight of the cost; steered to the target if there is one.
        target_speedup, target_cur: what the hard schedule must reach, at most one of them.
        cost_aware: each entry's cost is its share of MACs instead of 1.
        iterations: trajectories of `batch` images.
        batch: images an iteration, over all processes.
        lr: of AdamW, weight decay 0.
        tau, order: as in `Gating`.
        init: "normal" (N(0, 1)), or the name of the schedule to start from: r is on its side of 1/2,
            `init_distance` in logits.
        seed: of everything drawn.
    """

    objective: str = "sdt"
    estimator: str = "gain"
    refresh: int = 25
    lambda_batch: int = 8
    smoothing: float = 0.5
    bound: float = 1e4
    normalise: bool = True
    beta: float | None = None
    target_speedup: float | None = None
    target_cur: float | None = None
    cost_aware: bool = True
    iterations: int = 150
    batch: int = 4
    lr: float = 0.05
    tau: float = TAU
    order: int = 0
    init: str = "normal"
    init_distance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_tau(self.tau)
        for name, allowed in (("objective", OBJECTIVES), ("estimator", ESTIMATORS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        for name in ("refresh", "lambda_batch", "iterations", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.beta is not None and not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta: expected a number from 0 on, got {self.beta}")
        if self.target_speedup is not None and self.target_cur is not None:
            raise ValueError(f"expected one target, got speed-up {self.target_speedup} and CUR {self.target_cur}")
        if self.beta is None and self.target_speedup is None and self.target_cur is None:
            raise ValueError("expected beta, a target speed-up or a target CUR, got none")

    @classmethod
    def paper(cls, steps: int, **changes: Any) -> Settings:
        """HarmoniCa's official run on DiT-XL/2: batch 64, 20,000 optimiser steps (one a step of a trajectory)."""
        official = {
            "estimator": "leave-one-out",
            "refresh": max(1, round(500 / steps)),
            "smoothing": 0.0,
            "bound": float("inf"),
            "normalise": False,
            "beta": 7e-8,
            "cost_aware": False,
            "iterations": max(1, 20_000 // steps),
            "batch": 64,
            "lambda_batch": 64,
            "lr": 0.01,
        }
        return cls(**{**official, **changes})


@dataclass(frozen=True)
class Progress:
    """Where a training is, after an iteration. `cur`: what is reused by r, 1 - mean(r)."""

    iteration: int
    seconds: float
    loss: float
    mse: float
    beta: float
    cur: float
    lambdas: tuple[float, float]


class Trainer:
    """Learns a router for a task.

    Args:
        settings: how.
        accelerator: one of your own for mixed precision or trackers; a plain one unless given.
        images: for L2C, real samples [n, channels, height, width] and their conditions (a tuple of [n, ...]).
        start: schedule of a warm start, with `settings.init` as its name.
    """

    def __init__(
        self,
        task: Task,
        settings: Settings,
        accelerator: Accelerator | None = None,
        images: tuple[Tensor, tuple[Tensor, ...]] | None = None,
        start: Schedule | None = None,
    ) -> None:
        self.task, self.settings, self.images = task, settings, images
        self.accelerator = accelerator or Accelerator(cpu=task.device.type == "cpu")
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        if settings.batch % self.ranks:
            raise ValueError(f"batch: expected a multiple of {self.ranks} processes, got {settings.batch}")
        if (settings.objective == "l2c") != (images is not None):
            raise ValueError(f"images: the l2c objective needs them, and sdt none; got {settings.objective}")
        adapter = task.adapter
        pinned = pinned_steps(task.steps, settings.objective)
        self.router = Router(task.steps, adapter.layers, len(adapter.branches), settings.seed, pinned).to(task.device)
        if start is None and settings.init != "normal":
            raise ValueError(f"init: expected the schedule {settings.init!r} names as start, got none")
        if start is not None:
            adapter.check_schedule(start)
            if start.steps != task.steps:
                raise ValueError(f"init: expected a schedule of {task.steps} steps, got {start.steps}")
            self.router.start_from(start.compute, settings.init_distance)
        rows = [row for row in self.router.logits if row.requires_grad]
        self.optimizer = torch.optim.AdamW(rows, lr=settings.lr, weight_decay=0.0)
        self.budget = None
        if settings.target_speedup is not None or settings.target_cur is not None:
            self.budget = Budget(
                adapter,
                task.steps,
                settings.target_speedup,
                settings.target_cur,
                pinned,
                costs=macs(adapter, task.context),
            )
        self.beta = Beta(settings.beta, self.budget)
        self.lambdas = Lambda(task.steps, settings.smoothing, settings.bound, settings.normalise)
        counted = macs(adapter, task.context).entries
        costs = counted / counted.mean() if settings.cost_aware else np.ones_like(counted)
        self.costs = torch.tensor(costs, dtype=torch.float32, device=task.device)
        self.iteration, self.seconds = 0, 0.0

    # ---- running

    def run(
        self, path: Path | None = None, every: int = 25, on_progress: Callable[[Progress], None] | None = None
    ) -> Schedule:
        """Train to the last iteration, or until SIGINT or SIGTERM; the hard schedule.

        Args:
            path: checkpoint, written every `every` iterations and at the end. None: no checkpoints.
        """
        with stopping(self.accelerator) as stopped:
            while self.iteration < self.settings.iterations:
                began = time.perf_counter()
                loss, mse = self._iterate()
                self.iteration += 1
                self.seconds += time.perf_counter() - began
                stop = stopped()
                last = stop or self.iteration == self.settings.iterations
                if path is not None and (last or self.iteration % every == 0):
                    self.save(path)
                if on_progress is not None and self.accelerator.is_main_process:
                    on_progress(self._progress(loss, mse))
                if stop:
                    break
        return self.schedule()

    def _iterate(self) -> tuple[float, float]:
        settings = self.settings
        if settings.estimator != "none" and settings.objective == "sdt" and self.iteration % settings.refresh == 0:
            self._refresh()
        losses, errors = [], []
        for step in self._steps():
            weight = self.lambdas[step.step]
            error = weight * step.mse
            loss = error + (self.beta.value or 0.0) * (self.costs * step.gates).sum()
            row = self.router.logits[step.step]
            (gradient,) = torch.autograd.grad(loss, row)
            row.grad = self._mean(gradient)
            if not row.grad.isfinite().all():
                raise LossNotFinite(
                    f"iteration {self.iteration}, step {step.step}: the gradient is not finite (loss {loss.item()}); "
                    "the last checkpoint is untouched"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.router.clamp_()
            losses.append(loss.item())
            errors.append(step.mse.item())
        if self.beta.value is None:
            self.beta.start(self._mean(torch.tensor(np.mean(losses), device=self.task.device)).item(), len(self.costs))
        gates = torch.stack([self.router.gates(step).detach() for step in range(self.task.steps)])
        self.beta.steer(gates.double().cpu().numpy())
        return float(np.mean(losses)), float(np.mean(errors))

    def _steps(self) -> Iterator[StepLoss]:
        settings, seed = self.settings, self._seed(self.iteration)
        share = settings.batch // self.ranks
        start, end = self.rank * share, (self.rank + 1) * share
        with self.accelerator.autocast():
            if settings.objective == "sdt":
                yield from sdt(
                    self.task, self.router, self.gating, self.task.draw(settings.batch, seed).part(start, end)
                )
                return
            assert self.images is not None, "the constructor asks for them"
            samples, conditions = self.images
            chosen = torch.randint(len(samples), (settings.batch,), generator=torch.Generator().manual_seed(seed))
            drawn = self.task.draw(settings.batch, seed)
            known = tuple(c[chosen].to(self.task.device) for c in conditions)
            batch = Batch(drawn.noise, known, drawn.unconditional).part(start, end)
            real = samples[chosen][start:end].to(batch.noise)
            yield from l2c(self.task, self.router, self.gating, batch, real, seed + STEP_SEED)

    def _refresh(self) -> None:
        batch = self.task.draw(self.settings.lambda_batch, self._seed(self.iteration) + IEPO_SEED)
        with self.accelerator.autocast():
            estimate = image_errors(
                self.task, self.router, self.gating, batch, self.settings.estimator, self.rank, self.ranks
            )
        summed = self.accelerator.reduce(estimate.to(self.task.device, torch.float32), "sum")
        self.lambdas.update(summed.cpu().double())

    @property
    def gating(self) -> Gating:
        return Gating(self.settings.tau, self.settings.order)

    def schedule(self) -> Schedule:
        """The hard schedule: at the budget if there is one, else at tau."""
        settings, fields = self.settings, self.task.fields()
        name = settings.objective.upper()
        if settings.objective == "sdt":
            name += "" if settings.estimator == "none" else f" + IEPO ({settings.estimator})"
        made = f"{name}, {self.iteration} iterations of {settings.batch}, seed {settings.seed}, {self.seconds:.0f} s"
        tau = self.tau()
        schedule = self.router.to_schedule(tau, order=settings.order, **fields)
        compute = schedule.compute.reshape(schedule.steps, -1)
        if self.budget is not None and not self.budget.met(compute):
            warnings.warn(
                f"the schedule misses its target by {100 * self.budget.miss(compute):+.1f} %: too many entries have "
                "learned the same r; more iterations tell them apart",
                stacklevel=2,
            )
        return schedule.replace(note=f"{made}, {describe(schedule, self.budget)}, tau {tau:.3g}")

    def tau(self) -> float:
        """Where the hard schedule divides the router's r: at the budget if there is one, else as set."""
        return self.settings.tau if self.budget is None else self.budget.tau(self.router)

    # ---- state

    def save(self, path: Path) -> None:
        """Write a checkpoint (the main process alone)."""
        if not self.accelerator.is_main_process:
            return
        tensors = {"logits": self.router.to_tensor(), **checkpoint.optimizer_tensors(self.optimizer)}
        if self.lambdas.values is not None:
            tensors["lambda"] = self.lambdas.values
        state = {
            "identity": checkpoint.identity(self.task),
            "settings": asdict(self.settings),
            "iteration": self.iteration,
            "seconds": self.seconds,
            "beta": self.beta.value,
            "miss": self.beta.miss,
        }
        checkpoint.write(path, tensors, state)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError if it is of another task or other settings."""
        tensors, state = checkpoint.read(path, self.task)
        expected = {name: value for name, value in asdict(self.settings).items() if name != "iterations"}
        with checkpoint.whole(path):
            checkpoint.check_settings(path, expected, state["settings"])
            if "logits" not in tensors:
                raise ValueError(f"{path}: expected logits, got {sorted(tensors)}")
            self.router.load(tensors["logits"])
            checkpoint.load_optimizer(self.optimizer, tensors)
            self.lambdas.values = tensors.get("lambda")
            self.iteration, self.seconds = state["iteration"], state["seconds"]
            self.beta.value, self.beta.miss = state["beta"], state["miss"]

    # ---- small parts

    def _seed(self, iteration: int) -> int:
        return TRAIN_SEED + self.settings.seed * 1_000_003 + iteration

    def _mean(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "mean") if self.ranks > 1 else tensor

    def _progress(self, loss: float, mse: float) -> Progress:
        assert self.beta.value is not None, "an iteration starts it"
        return Progress(
            self.iteration,
            self.seconds,
            loss,
            mse,
            self.beta.value,
            1.0 - torch.sigmoid(self.router.to_tensor()).mean().item(),
            self.lambdas.range,
        )
