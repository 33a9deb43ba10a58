"""Reuse weights of a hard schedule, learned on the end error (METHOD: Beyond the papers).

Which entries are computed is fixed; what stands in for the others, o = sum_k a_k c_k, starts at the forecast and
follows the gradient of log ||x_end - target||^2 through the whole run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from harmonica_rt.compiled import Schedules

from .contexts import ContextWeights
from .natural_gradient import NaturalGradient
from .reusing import CHECKPOINTS
from .starts import Starts, check_power, check_target, decibels, mean
from .stopping import never
from .trainer import TRAIN_SEED, LossNotFinite

VALIDATION_SEED, HELD_OUT_SEED = 1 << 43, 1 << 44  # apart from training's
SEARCHED = 10  # iterations after which the steps' length is looked for anew
RUNG, MOST = 3.0, 5  # times shorter or longer than the length before: a step of the search, and how many of them


@dataclass(frozen=True)
class WeightSettings:
    """How to learn reuse weights.

    Attributes:
        target: "full": the same run without reuse; "converged": the solution that its sampler approximates.
        iterations: steps of the optimiser; their length falls to 0 over them (cosine).
        minutes: time to stop after, if that comes first; the length then follows the time.
        batch: runs an iteration, over all processes.
        accumulate: backward passes an iteration is split into.
        pool: starts that are drawn once; their targets are computed once each.
        validation: further starts, on which the best weights so far are told; `every` iterations.
        lr: root mean square of the weights' changes in a step, from which the steps' length is looked for.
        power: of the mean error that is lowered, as in `starts.mean`: the higher, the more the worst images count.
        carry, channels: whether carries, and weights per channel, are learned too.
        checkpointing: one of `CHECKPOINTS`.
        seed: of the starts.
    """

    target: str = "full"
    iterations: int = 150
    minutes: float | None = None
    batch: int = 12
    accumulate: int = 1
    pool: int = 384
    validation: int = 48
    every: int = 20
    lr: float = 0.03
    power: float = 0.0
    carry: bool = False
    channels: bool = False
    checkpointing: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        check_target(self.target)
        if self.checkpointing not in CHECKPOINTS:
            raise ValueError(f"checkpointing: expected one of {CHECKPOINTS}, got {self.checkpointing!r}")
        for name in ("iterations", "batch", "accumulate", "pool", "validation", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("minutes", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        check_power(self.power)
        if self.pool < self.batch:
            raise ValueError(f"pool: expected at least a batch of {self.batch}, got {self.pool}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch: expected a multiple of {self.accumulate} parts, got {self.batch}")


@dataclass(frozen=True)
class WeightProgress:
    """After an iteration.

    Attributes:
        error: mean over its runs of the mean squared end error in dB, 10 log10.
        judged: that of the best weights so far on the validation's runs, with the settings' power.
        share: of the budget spent.
    """

    iteration: int
    seconds: float
    error: float
    judged: float
    share: float


@dataclass(frozen=True)
class Judged:
    """Changes of weights, [n], and the validation's errors with them, [validation] in dB; the power of their mean."""

    change: Tensor
    errors: Tensor
    power: float = 0.0

    @property
    def mean(self) -> float:
        """Of the errors."""
        return mean(self.errors, self.power)


@dataclass(frozen=True)
class TrainerState:
    """Where a trainer is, to go on from.

    Attributes:
        change, best, length: as in the trainer.
        gradient: the natural gradient's own.
        minutes: of its settings.
    """

    change: Tensor
    best: Judged
    gradient: dict[str, Tensor]
    length: float
    iteration: int
    seconds: float
    minutes: float | None

    def tensors(self) -> dict[str, Tensor]:
        own = {"change": self.change, "best.change": self.best.change, "best.errors": self.best.errors}
        return own | {f"gradient.{name}": tensor for name, tensor in self.gradient.items()}

    def numbers(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in ("length", "iteration", "seconds", "minutes")}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> TrainerState:
        """From what `tensors` and `numbers` gave."""
        gradient = {name.removeprefix("gradient."): t for name, t in tensors.items() if name.startswith("gradient.")}
        return cls(tensors["change"], Judged(tensors["best.change"], tensors["best.errors"]), gradient, **numbers)


class LearnedFor(Protocol):
    """What of a `PipelineTask` the trainer of its weights needs."""

    device: torch.device
    width: int | None

    @property
    def entered(self) -> tuple[int, ...]: ...
    def starts(self, target: str, count: int, seed: int) -> Starts: ...


class WeightTrainer:
    """Learns the reuse weights of a schedule.

    Args:
        schedule: for the task's model and sampler, or one a context; their weights are the start.
        starts, validation: to share with other trainers of the task; drawn as the settings say unless given.
        on_better: told each schedule that is better than all before it, and its error in dB; in every process.
        on_target: told how many of the validation's targets there are, before each part; what it raises ends it.
        state: to go on from, of a trainer of the same schedule.

    Attributes:
        best: the weights that did best on the validation's runs so far, those of the start at first.
        length: of a step, root mean square of the weights' changes, before it falls to 0 over the iterations.
    """

    def __init__(
        self,
        task: LearnedFor,
        schedule: Schedules,
        settings: WeightSettings,
        accelerator: Accelerator | None = None,
        starts: Starts | None = None,
        validation: Starts | None = None,
        on_target: Callable[[int], None] = lambda done: None,
        on_better: Callable[[Schedules, float], None] = lambda schedule, error: None,
        state: TrainerState | None = None,
    ) -> None:
        self.task, self.settings, self.on_better = task, settings, on_better
        self.accelerator = accelerator or Accelerator(cpu=task.device.type == "cpu")
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        if settings.batch % (self.ranks * settings.accumulate):
            raise ValueError(
                f"batch: expected a multiple of {self.ranks} processes x {settings.accumulate} parts, "
                f"got {settings.batch}"
            )
        width = task.width if settings.channels else None
        self.weights = ContextWeights(schedule, task.device, settings.carry, width, task.entered)
        self.gradient = NaturalGradient()
        seed = TRAIN_SEED + settings.seed * 1_000_003
        self.starts = starts or task.starts(settings.target, settings.pool, seed)
        self.validation = validation or task.starts(settings.target, settings.validation, seed + VALIDATION_SEED)
        self.length, self.iteration, self.seconds = settings.lr, 0, 0.0
        for done in self.validation.prepare(self.accelerator):
            on_target(done)
        if state is None:
            self.best = Judged(self.weights.change.clone(), self._errors(schedule), settings.power)
        else:
            self._load(state)

    def run(
        self,
        on_progress: Callable[[WeightProgress], None] | None = None,
        stopped: Callable[[], bool] = never,
        keep: Callable[[bool], None] = lambda now: None,
    ) -> Schedules:
        """Learn to the end of the budget, or until `stopped`; the schedule with the best weights.

        Args:
            keep: called where `state` is one to go on from as if nothing had happened, and told whether not to miss it.

        Raises:
            LossNotFinite: the weights diverged. `schedule` has the best ones until then.
        """
        began, share = time.perf_counter(), self._share()
        while share < 1 and not stopped():
            error = self._iterate(share).mean().item()
            self.iteration += 1
            self.seconds += time.perf_counter() - began
            began, share = time.perf_counter(), self._share()
            better = (share >= 1 or self.iteration % self.settings.every == 0) and self._judge()
            keep(better or share >= 1)
            if on_progress is not None and self.accelerator.is_main_process:
                on_progress(WeightProgress(self.iteration, self.seconds, error, self.best.mean, min(1.0, share)))
        if share < 1:  # it was stopped
            keep(True)
            if self.iteration % self.settings.every:
                self._judge()
        return self.schedule()

    def state(self) -> TrainerState:
        """To go on from."""
        where = self.length, self.iteration, self.seconds, self.settings.minutes
        return TrainerState(self.weights.change, self.best, self.gradient.state(), *where)

    def _load(self, state: TrainerState) -> None:
        expected, got = len(self.weights.change), len(state.change)
        if expected != got:
            raise ValueError(f"checkpoint: expected {expected} weights, got {got}")

        def own(tensor: Tensor) -> Tensor:  # where a file has it is seldom aligned, by which products differ
            return tensor.to(self.task.device, copy=True)

        self.weights.change = own(state.change)
        self.best = Judged(own(state.best.change), own(state.best.errors), self.settings.power)
        self.gradient.load({name: own(tensor) for name, tensor in state.gradient.items()})
        self.length, self.iteration, self.seconds = state.length, state.iteration, state.seconds

    def schedule(self) -> Schedules:
        """The schedule with the best weights so far."""
        return self.weights.to_schedule(self.best.change)

    def succeeded_by(
        self, schedule: Schedules, settings: WeightSettings, state: TrainerState | None = None
    ) -> WeightTrainer:
        """A trainer of another schedule on the same starts; with `state` it goes on."""
        shared = self.accelerator, self.starts, self.validation
        return WeightTrainer(self.task, schedule, settings, *shared, on_better=self.on_better, state=state)

    def _judge(self) -> bool:
        """Keep the weights as they are now if they are the best so far, and tell whether they are."""
        judged = Judged(self.weights.change.clone(), self._errors(self.weights.to_schedule()), self.settings.power)
        if better := judged.mean < self.best.mean:
            self.best = judged
            self.on_better(self.schedule(), judged.mean)
        return better

    def _errors(self, schedule: Schedules) -> Tensor:
        return self.validation.judge(schedule, self.accelerator)

    def _share(self) -> float:
        """How much of the budget is spent."""
        settings, share = self.settings, self.iteration / self.settings.iterations
        if settings.minutes is not None:
            spent = torch.tensor(self.seconds / (60 * settings.minutes), device=self.task.device)
            share = max(share, (self.accelerator.reduce(spent, "mean") if self.ranks > 1 else spent).item())
        return share

    def _iterate(self, share: float) -> Tensor:
        """One step of the weights; its runs' errors with the weights as they were, dB."""
        gradients: list[Tensor] = []
        errors: list[Tensor] = []
        for start, end in self._parts(self.iteration):
            change = self.weights.change.repeat(end - start, 1).requires_grad_()
            numbers, checkpointing = self.weights(change), self.settings.checkpointing
            result = self.starts.result(self.weights.schedules, numbers, start, end, checkpointing)
            logs = self.starts.errors(result, start, end)
            gradients += torch.autograd.grad(logs.sum(), change)
            errors.append(decibels(logs.detach()))
        rows = self.accelerator.gather(torch.cat(gradients))
        if not rows.isfinite().all():
            raise LossNotFinite(
                f"iteration {self.iteration}: the gradient is not finite (errors {torch.cat(errors).tolist()} dB)"
            )
        shares = self._shares(torch.cat(errors))
        direction, falling = self.gradient.direction(rows, shares), 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        if self.iteration % SEARCHED == 0:
            self.length = self._searched(falling * direction)
        self.weights.change -= falling * self.length * direction
        if self.ranks > 1:  # devices of different kinds round differently
            self.weights.change = broadcast(self.weights.change)
        return torch.cat(errors)

    def _shares(self, errors: Tensor) -> Tensor | None:
        """What each image's gradient has of their mean error's, as it is lowered; errors in dB, this process's."""
        power = self.settings.power
        return None if power == 0 else torch.softmax(math.log(10) / 10 * power * self.accelerator.gather(errors), 0)

    def _searched(self, direction: Tensor) -> float:
        """The best length of a step, going shorter or longer as long as that is better."""
        best, error = self.length, self._tried(self.weights.change - self.length * direction)
        for times in (1 / RUNG, RUNG):
            for rung in range(1, MOST + 1):
                length = self.length * times**rung
                if (own := self._tried(self.weights.change - length * direction)) >= error:
                    break
                best, error = length, own
            if best != self.length:
                break
        return best

    @torch.no_grad()
    def _tried(self, change: Tensor) -> float:
        """Mean error, dB, of the runs that come next, of which the gradients know nothing."""
        errors = []
        for start, end in self._parts(self.iteration + 1):
            result = self.starts.result(self.weights.schedules, self.weights(change), start, end)
            errors.append(decibels(self.starts.errors(result, start, end)))
        error = mean(self.accelerator.gather(torch.cat(errors)), self.settings.power)
        return error if math.isfinite(error) else math.inf

    def _parts(self, iteration: int) -> list[tuple[int, int]]:
        """Which starts this process runs in an iteration."""
        settings = self.settings
        size = settings.batch // settings.accumulate // self.ranks
        first = iteration % (len(self.starts) // settings.batch) * settings.batch
        parts = [first + (part * self.ranks + self.rank) * size for part in range(settings.accumulate)]
        return [(start, start + size) for start in parts]
