"""Learning on the end error, whole: the best of some starts, weights, a verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator

from harmonica_rt.compiled import Schedules

from .contexts import every, noted
from .pipeline_task import PipelineTask
from .record import Course, Kept, Record
from .starts import HOLDS, mean
from .stopping import EndedEarly, never
from .trainer import TRAIN_SEED, LossNotFinite
from .weights import HELD_OUT_SEED, WeightProgress, WeightSettings, WeightTrainer

RACE = 0.35  # share of the time for several starts; the rest: weights of the best
PATIENCE = 2  # starts that are no better
TRIAL = 16  # iterations of each of several starts, if so many are asked for


@dataclass(frozen=True)
class Progress:
    """Where the learning is.

    Attributes:
        share: of the whole budget spent.
        gained: dB below the error of the first start with the forecast's weights, on the validation's runs.
        phase: what is being done.
        iterations: steps of the weights so far.
        detail: how far the phase is.
        left: seconds to the end, the verdict's included once a run's cost is known; None where nothing tells.
    """

    share: float
    gained: float
    phase: str
    iterations: int
    detail: str
    left: float | None

    def __str__(self) -> str:
        detail = f"{self.detail}, " if self.detail else ""
        return f"{detail}iteration {self.iterations}, {self.gained:+.2f} dB over the forecast"


@dataclass(frozen=True)
class Learned:
    """A learned schedule and its verdict: mean SNR in dB to the target on noises held out.

    Attributes:
        snr, forecast: of the schedule, and of the same one with the forecast's weights; None, both, where it was
            stopped before anything better than the forecast was found: there is nothing to judge.
        full: of the run without reuse; None where that is the target.
        failure: why it ended early with the best schedule until then, if it did.
    """

    schedule: Schedules
    snr: float | None
    forecast: float | None
    full: float | None
    failure: LossNotFinite | None = None


def learn(
    task: PipelineTask,
    starts: Sequence[Schedules],
    settings: WeightSettings,
    minutes: float | None = None,
    accelerator: Accelerator | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stopped: Callable[[], bool] = never,
    on_better: Callable[[Schedules], None] = lambda schedule: None,
    record: Record | None = None,
    plain: bool = False,
) -> Learned:
    """Learn what to compute and with what weights to reuse the rest.

    Args:
        starts: what may be computed, and its weights, of all contexts or of each. If there are several, each learns
            for `TRIAL` iterations, or those of `settings`, until `PATIENCE` are no better; the best goes on.
        settings: of the weights that go on.
        minutes: for all but the verdict, if they end before the iterations.
        on_better: told each schedule that is better than those before it, and than the forecast.
        record: where it is kept, to go on from with the same result; `starts` are then its own.
        plain: try the first start without weights per channel, too; where that is better, nothing has them.
    """
    check_minutes(minutes)
    accelerator, record = accelerator or Accelerator(cpu=task.device.type == "cpu"), record or Record()
    kept, record.starts = record.kept, starts
    course = kept.course if kept else Course(0, 0, settings.channels, 0, math.nan, math.inf, 0.0, 0.0)
    tries = [starts[0], *starts] if plain else [*starts]
    unlearned = starts[0] == task.unlearned(starts[0])
    began = time.perf_counter() - course.seconds
    iterations, forecast, reached, judging = course.iterations, course.forecast, course.reached, course.judging

    def left(share: float, of: int = 1) -> float | None:
        """Minutes for one of so many parts that end when `share` of the time is spent."""
        return None if minutes is None else max(1e-3, (share * minutes - (time.perf_counter() - began) / 60) / of)

    def show(share: float, phase: str, error: float | None = None, more: int = 0, detail: str = "") -> None:
        if not accelerator.is_main_process:
            return
        share, spent = min(1.0, share), time.perf_counter() - began
        ends = [] if minutes is None else [max(0.0, 60 * minutes - spent)]
        if share > 0:
            ends.append(spent * (1 - share) / share)
        gained = 0.0 if error is None else forecast - error
        on_progress(Progress(share, gained, phase, iterations + more, detail, min(ends) + judging if ends else None))

    def targets(done: int) -> None:
        show(0.0, "targets", detail=f"{done} of {settings.validation} noises")
        if stopped() and kept is None and unlearned:
            raise EndedEarly

    def weights(low: float, high: float, phase: str) -> Callable[[WeightProgress], None]:
        return lambda p: show(low + (high - low) * p.share, phase, p.judged, p.iteration)

    def better(schedule: Schedules, error: float) -> None:
        nonlocal reached
        if error < reached:
            reached = error  # in every process, since they decide by it
            if accelerator.is_main_process:
                on_better(schedule)

    def keeps(at: int, best: WeightTrainer, own: WeightTrainer) -> Callable[[bool], None]:
        """For what learns at `at` (`Course`), beside the best of those before."""

        def whole() -> Kept:
            spent = time.perf_counter() - began
            now = Course(at, leader, channels, iterations, forecast, reached, judging, spent)
            return Kept(now, replace(best.state(), gradient={}), own.state())

        return lambda now: record.keep(now, whole) if accelerator.is_main_process else None

    race = RACE if len(tries) > 1 else 0.0
    trial = min(TRIAL, settings.iterations)
    first = replace(settings, iterations=trial, every=trial)
    try:
        leader, channels = course.leader, course.channels
        told: dict[str, Any] = {"on_target": targets, "on_better": better}
        own = replace(first, channels=channels)
        trainer = WeightTrainer(
            task, tries[leader], own, accelerator, **told, state=None if kept is None else kept.best
        )
    except EndedEarly:
        return _nothing(starts[0], settings, time.perf_counter() - began)
    if kept is None:
        errors = trainer.validation.judge(task.unlearned(starts[0]), accelerator)
        forecast = reached = mean(errors, settings.power)
        judging = (time.perf_counter() - began) * task.held_out / settings.validation

    def going_on(at: int, schedule: Schedules, own: WeightSettings) -> WeightTrainer:
        """The trainer whose turn it is: as it was kept, or another."""
        state = kept.trainer if kept and at == course.at else None
        return trainer.succeeded_by(schedule, own if state is None else replace(own, minutes=state.minutes), state)

    failure = None
    try:
        for k in range(course.at, len(tries) if race else 0):
            part, minutes_each, per_channel = race / len(tries), left(race, len(tries) - k), channels
            phase = f"start {k + 1} of {len(tries)}"
            if plain and k == 1:
                phase, per_channel = f"{phase}, no weights per channel", False
            show(k * part, phase, trainer.best.mean)
            tried = going_on(k, tries[k], replace(first, channels=per_channel, minutes=minutes_each))
            tried.run(weights(k * part, (k + 1) * part, phase), stopped, keeps(k, trainer, tried))
            iterations += tried.iteration
            if k == 0 or tried.best.mean < trainer.best.mean:
                trainer, leader, channels = tried, k, per_channel
            elif k - leader == (PATIENCE + 1 if plain and leader == 0 else PATIENCE):
                break
            if stopped():
                break
        if not stopped():
            show(race, "weights", trainer.best.mean)
            best, at = trainer, len(tries)
            trainer = going_on(at, best.schedule(), replace(settings, channels=channels, minutes=left(1.0)))
            trainer.run(weights(race, 1.0, "weights"), stopped, keeps(at, best, trainer))
            iterations += trainer.iteration
    except LossNotFinite as error:
        failure = error
    seconds = time.perf_counter() - began
    if failure is None and stopped() and unlearned and reached >= forecast:
        return _nothing(trainer.schedule(), settings, seconds)
    show(1.0, "verdict", trainer.best.mean, detail=f"on {task.held_out} noises held out")
    return _verdict(task, trainer, seconds, failure)


def check_minutes(minutes: float | None) -> None:
    """Raise ValueError unless one can learn for so long."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes: expected a number above 0, got {minutes}")


def _nothing(schedule: Schedules, settings: WeightSettings, seconds: float) -> Learned:
    note = (
        f"ended early after {seconds:.0f} s, nothing better than the forecast yet (target {settings.target}, "
        f"seed {settings.seed})"
    )
    return Learned(noted(schedule, note), None, None, None)


def _verdict(task: PipelineTask, trainer: WeightTrainer, seconds: float, failure: LossNotFinite | None) -> Learned:
    settings, accelerator, schedule = trainer.settings, trainer.accelerator, trainer.schedule()
    held_out = task.starts(settings.target, task.held_out, TRAIN_SEED + settings.seed * 1_000_003 + HELD_OUT_SEED)

    def snr(judged: Schedules) -> float:
        return -mean(held_out.judge(judged, accelerator))

    full = None
    if settings.target != "full":
        full = snr(task.full(every(schedule)[0].order))
    reached, forecast = snr(schedule), snr(task.unlearned(schedule))
    power = f"power {settings.power:g}, " if settings.power else ""
    aim = "the full run" if full is None else f"the converged run (full run {full:.1f})"
    note = (
        f"learned on the end error, target {settings.target}: {settings.batch} noises an iteration of "
        f"{settings.pool}, {power}seed {settings.seed}, {seconds:.0f} s; {reached:.1f} dB SNR to {aim} on "
        f"{task.held_out} noises held out, the forecast {forecast:.1f}; {HOLDS}"
    )
    return Learned(noted(schedule, note), reached, forecast, full, failure)
