"""Which entries to compute, found together with the reuse weights: moves at a fixed budget, judged by running them.

A move shifts what some neighbouring steps compute by one, of a range of layers, so it costs nothing. Weights are
carried over to it (`Schedule.with_compute`): before any learning that is 0.1 to 3.2 dB better than the forecast again.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from harmonica_rt.schedule import Schedule

from .stopping import never
from .trainer import LossNotFinite
from .weights import WeightTrainer


@dataclass(frozen=True)
class Move:
    """What `steps` compute moves on by `shift` places among them, around, in layers `low` to `high` - 1.

    Attributes:
        branch: None for all.
    """

    steps: tuple[int, ...]
    shift: int
    low: int
    high: int
    branch: int | None = None

    def __call__(self, compute: np.ndarray) -> np.ndarray:
        """bool [T, L, B] after the move."""
        moved, branch = compute.copy(), slice(None) if self.branch is None else self.branch
        for step, start in zip(self.steps, np.roll(self.steps, self.shift)):
            moved[step, self.low : self.high, branch] = compute[start, self.low : self.high, branch]
        return moved

    def __str__(self) -> str:
        branch = "" if self.branch is None else f", branch {self.branch}"
        return (
            f"steps {self.steps[0]} to {self.steps[-1]} by {self.shift:+}, layers {self.low} to {self.high - 1}{branch}"
        )


@dataclass(frozen=True)
class SearchProgress:
    """After a move was judged.

    Attributes:
        judged, taken: moves so far.
        change: dB by which it was worse (positive) or better.
        error: of the schedule kept, dB on the validation's runs.
        share: of the budget spent.
    """

    move: Move
    judged: int
    taken: int
    change: float
    error: float
    share: float


class Search:
    """Finds what to compute, by moves from a schedule whose weights were learned.

    A round draws moves, judges them with the weights carried over, and follows the best of them: their weights learn
    for a few iterations. The first that is then better is taken.

    Args:
        trainer: of the start's weights; its starts, validation and settings serve every move.
        minutes: budget; None for none.
        moves: most moves to judge.
        drawn, followed: moves a round, and how many of them learn.
        iterations, lr: of a move's weights.
        seed: of the moves.
    """

    def __init__(
        self,
        trainer: WeightTrainer,
        minutes: float | None = None,
        moves: float = math.inf,
        drawn: int = 24,
        followed: int = 4,
        iterations: int = 15,
        lr: float = 0.03,
        seed: int = 0,
    ) -> None:
        self.trainer, self.minutes, self.moves = trainer, minutes, moves
        self.drawn, self.followed = drawn, followed
        self.settings = replace(trainer.settings, iterations=iterations, minutes=None, lr=lr, every=iterations)
        self.generator = np.random.default_rng(seed)
        self.tried = {trainer.schedule().compute.tobytes()}
        self.judged = self.taken = 0
        self.seconds = 0.0

    def run(
        self, on_progress: Callable[[SearchProgress], None] | None = None, stopped: Callable[[], bool] = never
    ) -> WeightTrainer:
        """Search to the end of the budget, or until `stopped`; the trainer of the best schedule's weights."""

        def over() -> bool:
            return self._time() >= 1 or stopped()

        def show(move: Move, change: float) -> None:
            share = min(1.0, self._share())  # which all processes must ask for
            if on_progress is not None and self.trainer.accelerator.is_main_process:
                error = self.trainer.best.errors.mean().item()
                on_progress(SearchProgress(move, self.judged, self.taken, change, error, share))

        while self.judged < self.moves and not over() and (moves := self._draw()):
            carried = []
            for move in moves[: int(min(len(moves), self.moves - self.judged))]:
                with self._timed():
                    trainer = self._trainer(move)
                    carried.append((_difference(trainer, self.trainer)[0], str(move), move, trainer))
                self.judged += 1
                show(move, carried[-1][0])
                if over():
                    break
            for _, _, move, trainer in sorted(carried, key=lambda judged: judged[:2])[: self.followed]:
                if over():
                    break
                with self._timed(), contextlib.suppress(LossNotFinite):  # what it had learned until then is judged
                    trainer.run()
                change, chance = _difference(trainer, self.trainer)
                if better := change < -chance:
                    self.trainer, self.taken = trainer, self.taken + 1
                show(move, change)
                if better:
                    break
        return self.trainer

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def _share(self) -> float:
        """How much of the budget is spent."""
        return max(self.judged / self.moves, self._time())

    def _time(self) -> float:
        """How much of the minutes is spent."""
        if self.minutes is None:
            return 0.0
        spent = torch.tensor(self.seconds / (60 * self.minutes), device=self.trainer.task.device)
        accelerator = self.trainer.accelerator
        return (accelerator.reduce(spent, "mean") if self.trainer.ranks > 1 else spent).item()

    def _trainer(self, move: Move) -> WeightTrainer:
        """Of the move's schedule, with the weights carried over."""
        schedule = self.trainer.schedule()
        return self.trainer.succeeded_by(schedule.with_compute(move(schedule.compute)), self.settings)

    def _draw(self) -> list[Move]:
        """Moves that lead to schedules not seen before, of whole steps first."""
        schedule = self.trainer.schedule()
        chosen: list[Move] = []
        whole = list(whole_steps(schedule))
        self.generator.shuffle(whole)
        for move in [*whole, *(_some_layers(schedule, self.generator) for _ in range(4 * self.drawn))]:
            moved = move(schedule.compute)
            if len(chosen) < self.drawn and moved.tobytes() not in self.tried:
                self.tried.add(moved.tobytes())
                chosen.append(move)
        return chosen


def whole_steps(schedule: Schedule) -> Iterator[Move]:
    """Every run of neighbouring computed steps, one step earlier or later."""
    places = np.flatnonzero(~schedule.output)
    computed = [k for k, step in enumerate(places) if schedule.compute[step].any()]
    for i, first in enumerate(computed):
        for last in computed[i:]:
            for shift in (-1, 1):
                low, high = (first - 1, last) if shift < 0 else (first, last + 1)
                if low > 0 and high < len(places):  # step 0 computes everything
                    yield Move(tuple(map(int, places[low : high + 1])), shift, 0, schedule.layers)


def _some_layers(schedule: Schedule, generator: np.random.Generator) -> Move:
    """A computed step of early or late layers, or of one branch of one layer, one step earlier or later."""
    places = np.flatnonzero(~schedule.output)[1:]
    first = int(generator.integers(max(1, len(places) - 1)))
    steps = tuple(map(int, places[first : first + 2]))
    layer, branch = int(generator.integers(schedule.layers)), int(generator.integers(len(schedule.branches)))
    low, high, which = [(0, layer + 1, None), (layer, schedule.layers, None), (layer, layer + 1, branch)][
        int(generator.integers(3))
    ]
    return Move(steps, 1, low, high, which)


def _difference(trainer: WeightTrainer, other: WeightTrainer) -> tuple[float, float]:
    """(by how many dB it is worse on the validation's runs, standard error of that)."""
    difference = trainer.best.errors - other.best.errors
    return difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()
