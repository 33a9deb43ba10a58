"""Learning on the end error, whole: what it keeps, what it says, how it ends."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from torch import Tensor

import harmonica_rt as hrt
import harmonica_rt.train.learn as learning
from harmonica_rt.schedule import Schedule
from harmonica_rt.train.learn import Learned, Progress, learn
from harmonica_rt.train.pipeline_task import PipelineTask
from harmonica_rt.train.starts import Starts
from harmonica_rt.train.trainer import TRAIN_SEED, LossNotFinite
from harmonica_rt.train.weights import HELD_OUT_SEED, WeightSettings

from .conftest import STEPS, make_pipeline_task

SHORT = {"iterations": 4, "batch": 2, "pool": 4, "validation": 4, "every": 2}
TRIAL, HELD_OUT = 4, 16  # short, too


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRIAL", TRIAL)
    monkeypatch.setattr(PipelineTask, "held_out", HELD_OUT)


def plan(task: PipelineTask, computed: tuple[int, ...] = (0, 2, 4), order: int = 1) -> Schedule:
    return task.schedule(computed, order)


OF_LEARN = ("minutes", "stopped")


def learned(*computed: tuple[int, ...], seen: list[Progress] | None = None, **options: Any) -> Learned:
    """From these computed steps; options are `learn`'s and settings of the weights."""
    task, given = make_pipeline_task(), {name: options.pop(name) for name in OF_LEARN if name in options}
    starts = [plan(task, c) for c in computed or ((0, 2, 4),)]
    seen = [] if seen is None else seen
    return learn(task, starts, WeightSettings(**{**SHORT, **options}), on_progress=seen.append, **given)


def snr(schedule: Schedule, target: str = "full", seed: int = 0) -> float:
    """To the target, on the noises held out."""
    starts = make_pipeline_task().starts(target, HELD_OUT, TRAIN_SEED + seed * 1_000_003 + HELD_OUT_SEED)
    return -starts.judge(schedule, Accelerator(cpu=True)).mean().item()


# ---- what is kept


def test_the_weights_alone_change() -> None:
    seen: list[Progress] = []
    result = learned(seen=seen)
    start = plan(make_pipeline_task())
    assert np.array_equal(result.schedule.compute, start.compute) and result.schedule.learned
    for name in ("order", "sampler", "timesteps", "guidance_scale", "model"):
        assert getattr(result.schedule, name) == getattr(start, name), name
    steps = [p for p in seen if p.phase == "weights"]
    assert [p.iterations for p in steps] == list(range(5))
    assert [p.share for p in steps] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert result.failure is None


def test_starts_learn_no_longer_than_asked_for() -> None:
    seen: list[Progress] = []
    learned((0, 4, 5), (0, 1, 2), seen=seen, iterations=2)
    assert [sum(p.phase == phase for p in seen) for phase in ("start 1 of 2", "start 2 of 2", "weights")] == [3, 3, 3]


@pytest.mark.parametrize("starts", [((0, 4, 5), (0, 1, 2)), ((0, 1, 2), (0, 4, 5))], ids=str)
def test_the_best_of_several_starts_goes_on(starts: tuple[tuple[int, ...], ...]) -> None:
    seen: list[Progress] = []
    result = learned(*starts, seen=seen)
    assert snr(plan(make_pipeline_task(), (0, 1, 2))) > snr(plan(make_pipeline_task(), (0, 4, 5))) + 10
    assert np.array_equal(result.schedule.compute, plan(make_pipeline_task(), (0, 1, 2)).compute)
    counts = [sum(p.phase == phase for p in seen) for phase in ("start 1 of 2", "start 2 of 2", "weights")]
    assert counts == [1 + TRIAL, 1 + TRIAL, 1 + 4]
    assert [p.iterations for p in seen if p.phase == "weights"] == [2 * TRIAL + i for i in range(5)]


def test_starts_are_tried_until_two_are_no_better() -> None:
    seen: list[Progress] = []
    learned((0, 4, 5), (0, 1, 2), (0, 3, 5), (0, 2, 5), (0, 1, 3), seen=seen, iterations=1)
    tried = {f"start {k} of 5" for k in (1, 2, 3, 4)}
    assert {p.phase for p in seen} == {"targets", *tried, "weights", "verdict"}


def test_weights_of_the_start_are_kept_until_better_ones_are_found() -> None:
    task = make_pipeline_task()
    start = plan(task)
    start = start.replace(weights=start.weights * 0.8)
    result = learn(task, [start], WeightSettings(**SHORT), stopped=lambda: True)
    np.testing.assert_allclose(result.schedule.weights, start.weights)
    assert abs(result.snr - result.forecast) > 0.1, "the forecast's weights are others"


def test_the_same_seed_learns_the_same() -> None:
    first, same, other = (learned((0, 4, 5), iterations=2, seed=seed).schedule for seed in (0, 0, 1))
    assert first.replace(note="") == same.replace(note="") != other.replace(note="")


# ---- the verdict


def test_the_verdict_is_the_snr_on_noises_held_out() -> None:
    result = learned(seed=3)
    assert result.snr == pytest.approx(snr(result.schedule, seed=3), abs=1e-3)
    assert result.forecast == pytest.approx(snr(plan(make_pipeline_task()), seed=3), abs=1e-3)
    assert result.snr > result.forecast and result.full is None
    assert re.fullmatch(
        r"learned on the end error, target full: 2 noises an iteration of 4, seed 3, \d+ s; "
        rf"{result.snr:.1f} dB SNR to the full run on 16 noises held out, the forecast {result.forecast:.1f}; "
        "for this guidance and number of steps alone",
        result.schedule.note,
    )


def test_the_verdict_on_the_converged_target_names_the_full_run() -> None:
    result, full = learned(target="converged", iterations=1), make_pipeline_task().full(1)
    assert result.full == pytest.approx(snr(full, "converged"), abs=1e-3)
    assert result.snr == pytest.approx(snr(result.schedule, "converged"), abs=1e-3)
    assert "target converged: " in result.schedule.note
    assert f"dB SNR to the converged run (full run {result.full:.1f}) on 16 noises" in result.schedule.note


def test_progress_is_against_the_forecast_of_the_first_start() -> None:
    seen: list[Progress] = []
    learned(seen=seen)
    assert seen[0].gained == 0 and seen[1].gained == pytest.approx(0, abs=1e-4), "not judged yet"
    assert [p.gained for p in seen] == sorted(p.gained for p in seen) and seen[-1].gained > 0


@pytest.mark.parametrize("minutes", [None, 5.0])
def test_progress_is_told_before_the_first_run_and_to_the_verdict(
    minutes: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    runs: list[int] = []  # how much was told before each of the targets' runs
    end = Starts.end
    monkeypatch.setattr(Starts, "end", lambda *part: runs.append(len(seen)) or end(*part))
    learned((0, 4, 5), (0, 1, 2), seen=seen, minutes=minutes)
    assert runs[0] == 1 and str(seen[0]) == "0 of 4 noises, iteration 0, +0.00 dB over the forecast"
    phases = list(dict.fromkeys(p.phase for p in seen))
    assert phases == ["targets", "start 1 of 2", "start 2 of 2", "weights", "verdict"]
    lefts = [p.left for p in seen]
    if minutes is None:
        assert lefts[0] is None and None not in lefts[2:], "nothing tells before the first iteration"
    else:
        assert 290 < lefts[0] <= 300, "the time given"
    assert 0 < lefts[-1] < lefts[2], "the verdict takes time, too"


# ---- how it ends


@pytest.mark.parametrize("after", [3, 2 + TRIAL, 4 + 2 * TRIAL, 5 + 2 * TRIAL])
def test_stopping_leaves_a_schedule_that_runs(after: int) -> None:
    seen: list[Progress] = []
    result = learned((0, 4, 5), (0, 1, 2), seen=seen, stopped=lambda: len(seen) >= after)
    assert after <= len(seen) <= after + 2 and result.failure is None
    pipeline = make_pipeline_task().sampled.owner
    hrt.compile(pipeline, result.schedule, backend="eager")
    assert pipeline([1], num_inference_steps=STEPS, output_type="latent").images.isfinite().all()
    assert math.isfinite(result.snr) and result.schedule.learned


@pytest.mark.parametrize("after", [0, 1])
def test_stopping_before_anything_was_learned_says_so(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    runs: list[int] = []
    end = Starts.end
    monkeypatch.setattr(Starts, "end", lambda own, *part: runs.append(part not in own.ends) or end(own, *part))
    result = learned((0, 4, 5), (0, 1, 2), seen=seen, stopped=lambda: len(seen) > after)
    assert re.match(r"ended early after \d+ s, nothing better than the forecast yet", result.schedule.note)
    assert (result.snr, result.forecast, result.failure) == (None, None, None)
    assert result.schedule.replace(note="") == plan(make_pipeline_task(), (0, 4, 5))
    assert len(seen) == after + 1 and seen[-1].phase == ("targets", "start 1 of 2")[after > 0]
    assert sum(runs) == (after > 0), "no target is computed that nobody waits for, and nothing is judged"


def test_minutes_end_it() -> None:
    seen: list[Progress] = []
    result = learned((0, 4, 5), (0, 1, 2), seen=seen, minutes=0.01, iterations=10**6)
    assert seen[-1].share == 1 and len(seen) < 1000
    assert int(re.search(r"(\d+) s;", result.schedule.note)[1]) < 20


def poison(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Errors of runs that are learned from are not numbers after so many of them."""
    errors: Callable[..., Tensor] = Starts.errors
    calls: list[int] = []

    def spoilt(starts: Starts, result: Tensor, *part: int) -> Tensor:
        if result.requires_grad:
            calls.append(1)
        return errors(starts, result, *part) * (math.nan if result.requires_grad and len(calls) > after else 1)

    monkeypatch.setattr(Starts, "errors", spoilt)


@pytest.mark.parametrize("after", [0, 3])
def test_a_failure_is_told_with_the_best_schedule(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    poison(monkeypatch, after)
    result = learned()
    assert isinstance(result.failure, LossNotFinite) and f"iteration {after}: " in str(result.failure)
    assert np.array_equal(result.schedule.compute, plan(make_pipeline_task()).compute)
    assert result.schedule.learned == (after > 0)
    assert result.snr > result.forecast if after else result.snr == pytest.approx(result.forecast)
