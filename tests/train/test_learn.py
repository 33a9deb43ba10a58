"""Learning on the end error, whole: what it keeps, what it says, how it ends. As a module: two processes learn."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import harmonica_rt as hrt
import harmonica_rt.train.learn as learning
from harmonica_rt.schedule import Schedule
from harmonica_rt.train import starts as starts_module
from harmonica_rt.train.learn import Learned, Progress, learn
from harmonica_rt.train.starts import TaskStarts as Starts
from harmonica_rt.train.task import Task
from harmonica_rt.train.trainer import TRAIN_SEED, LossNotFinite
from harmonica_rt.train.weights import HELD_OUT_SEED, WeightSettings

from .conftest import LAYERS, STEPS, make_task

SHORT = {"iterations": 4, "batch": 2, "pool": 4, "validation": 4, "every": 2}
TRIAL, HELD_OUT = 4, 16  # short, too
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRIAL", TRIAL)
    monkeypatch.setattr(Task, "held_out", HELD_OUT)


def plan(task: Task, computed: tuple[int, ...] = (0, 2, 4), order: int = 1) -> Schedule:
    compute = np.zeros((STEPS, LAYERS, 2), bool)
    compute[list(computed)] = True
    return Schedule(compute, order=order, **task.fields())


OF_LEARN = ("minutes", "moves", "stopped")


def learned(*computed: tuple[int, ...], seen: list[Progress] | None = None, **options: Any) -> Learned:
    """From these computed steps; options are `learn`'s and settings of the weights."""
    task, given = make_task(), {name: options.pop(name) for name in OF_LEARN if name in options}
    starts = [plan(task, c) for c in computed or ((0, 2, 4),)]
    seen = [] if seen is None else seen
    return learn(task, starts, WeightSettings(**{**SHORT, **options}), on_progress=seen.append, **given)


def psnr(schedule: Schedule, target: str = "full", seed: int = 0) -> float:
    """To the target, on the noises held out, samples in [-1, 1]."""
    starts = Starts(make_task(), target, HELD_OUT, TRAIN_SEED + seed * 1_000_003 + HELD_OUT_SEED)
    return 20 * math.log10(2) - starts.judge(schedule, Accelerator(cpu=True)).mean().item()


# ---- what is kept


def test_without_moves_the_weights_alone_change() -> None:
    seen: list[Progress] = []
    result = learned(seen=seen)
    start = plan(make_task())
    assert np.array_equal(result.schedule.compute, start.compute) and result.schedule.learned
    for name in ("order", "sampler", "timesteps", "guidance_scale", "model"):
        assert getattr(result.schedule, name) == getattr(start, name), name
    steps = [p for p in seen if p.phase == "weights"]
    assert [p.iterations for p in steps] == list(range(5))
    assert [p.share for p in steps] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert "moves" not in result.schedule.note and result.failure is None


def test_starts_learn_no_longer_than_asked_for() -> None:
    seen: list[Progress] = []
    learned((0, 4, 5), (0, 1, 2), seen=seen, iterations=2)
    assert [sum(p.phase == phase for p in seen) for phase in ("start 1 of 2", "start 2 of 2", "weights")] == [3, 3, 3]


def test_moves_keep_the_cost() -> None:
    seen: list[Progress] = []
    result, start = learned((0, 4, 5), seen=seen, moves=6), plan(make_task(), (0, 4, 5))
    assert np.array_equal(result.schedule.compute.sum(0), start.compute.sum(0))
    assert not np.array_equal(result.schedule.compute, start.compute), "steps that are badly placed move"
    assert re.search(r": [1-6] of 6 moves, ", result.schedule.note)
    shares = [p.share for p in seen]
    assert shares == sorted(shares) and shares[-1] == 1
    assert sum(p.phase == "weights" for p in seen) == 1 + 4
    assert any(re.fullmatch("[0-6] of 6 moves taken", p.detail) for p in seen if p.phase == "moves")


@pytest.mark.parametrize("starts", [((0, 4, 5), (0, 1, 2)), ((0, 1, 2), (0, 4, 5))], ids=str)
def test_the_best_of_several_starts_goes_on(starts: tuple[tuple[int, ...], ...]) -> None:
    seen: list[Progress] = []
    result = learned(*starts, seen=seen)
    assert psnr(plan(make_task(), (0, 1, 2))) > psnr(plan(make_task(), (0, 4, 5))) + 10
    assert np.array_equal(result.schedule.compute, plan(make_task(), (0, 1, 2)).compute)
    counts = [sum(p.phase == phase for p in seen) for phase in ("start 1 of 2", "start 2 of 2", "weights")]
    assert counts == [1 + TRIAL, 1 + TRIAL, 1 + 4]
    assert [p.iterations for p in seen if p.phase == "weights"] == [2 * TRIAL + i for i in range(5)]


def test_starts_are_tried_until_one_is_worse() -> None:
    seen: list[Progress] = []
    learned((0, 1, 2), (0, 4, 5), (0, 1, 3), seen=seen, iterations=1)
    assert {p.phase for p in seen} == {"targets", "start 1 of 3", "start 2 of 3", "weights", "verdict"}


def test_weights_of_the_start_are_kept_until_better_ones_are_found() -> None:
    task = make_task()
    start = plan(task)
    start = start.replace(weights=start.weights * 0.8)
    result = learn(task, [start], WeightSettings(**SHORT), stopped=lambda: True)
    np.testing.assert_allclose(result.schedule.weights, start.weights)
    assert abs(result.psnr - result.forecast) > 0.1, "the forecast's weights are others"


def test_the_same_seed_learns_the_same() -> None:
    first, same, other = (learned((0, 4, 5), moves=2, iterations=2, seed=seed).schedule for seed in (0, 0, 1))
    assert first.replace(note="") == same.replace(note="") != other.replace(note="")


# ---- the verdict


def test_the_verdict_is_the_psnr_on_noises_held_out() -> None:
    result = learned(seed=3)
    assert result.psnr == pytest.approx(psnr(result.schedule, seed=3), abs=1e-3)
    assert result.forecast == pytest.approx(psnr(plan(make_task()), seed=3), abs=1e-3)
    assert result.psnr > result.forecast and result.full is None
    assert re.fullmatch(
        r"learned on the end error, target full: 2 noises an iteration of 4, seed 3, \d+ s; "
        rf"{result.psnr:.1f} dB PSNR to the full run on 16 noises held out, the forecast {result.forecast:.1f}",
        result.schedule.note,
    )


def test_the_verdict_on_the_converged_target_names_the_full_run() -> None:
    result, full = learned(target="converged", iterations=1), Schedule.full(make_task().model, STEPS)
    assert result.full == pytest.approx(psnr(full, "converged"), abs=1e-3)
    assert result.psnr == pytest.approx(psnr(result.schedule, "converged"), abs=1e-3)
    assert "target converged: " in result.schedule.note
    assert f"dB PSNR to the converged run (full run {result.full:.1f}) on 16 noises" in result.schedule.note


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
    full_run = starts_module.full_run
    monkeypatch.setattr(starts_module, "full_run", lambda *task: runs.append(len(seen)) or full_run(*task))
    learned((0, 4, 5), (0, 1, 2), seen=seen, moves=2, minutes=minutes)
    assert runs[0] == 1 and str(seen[0]) == "0 of 4 noises, iteration 0, +0.00 dB over the forecast"
    phases = list(dict.fromkeys(p.phase for p in seen))
    assert phases == ["targets", "start 1 of 2", "start 2 of 2", "moves", "weights", "verdict"]
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
    result = learned((0, 4, 5), (0, 1, 2), seen=seen, moves=3, stopped=lambda: len(seen) >= after)
    assert after <= len(seen) <= after + 2 and result.failure is None
    model = hrt.compile(make_task().model, result.schedule, backend="eager")
    batch, task = make_task().draw(1, 3), make_task()
    labels = torch.cat([*batch.conditional, *batch.unconditional])
    assert model.trajectory(batch.noise, task.scheduler, task.guidance_scale, class_labels=labels).isfinite().all()
    assert math.isfinite(result.psnr) and result.schedule.learned


@pytest.mark.parametrize("after", [0, 1])
def test_stopping_before_anything_was_learned_says_so(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    runs: list[int] = []
    full_run = starts_module.full_run
    monkeypatch.setattr(starts_module, "full_run", lambda *task: runs.append(1) or full_run(*task))
    result = learned((0, 4, 5), (0, 1, 2), seen=seen, moves=3, stopped=lambda: len(seen) > after)
    assert re.match(r"ended early after \d+ s, nothing better than the forecast yet", result.schedule.note)
    assert (result.psnr, result.forecast, result.failure) == (None, None, None)
    assert result.schedule.replace(note="") == plan(make_task(), (0, 4, 5))
    assert len(seen) == after + 1 and seen[-1].phase == ("targets", "start 1 of 2")[after > 0]
    assert len(runs) == (after > 0), "no target is computed that nobody waits for, and nothing is judged"


def test_minutes_end_it() -> None:
    seen: list[Progress] = []
    result = learned((0, 4, 5), (0, 1, 2), seen=seen, minutes=0.01, iterations=10**6, moves=10**6)
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
    assert np.array_equal(result.schedule.compute, plan(make_task()).compute)
    assert result.schedule.learned == (after > 0)
    assert result.psnr > result.forecast if after else result.psnr == pytest.approx(result.forecast)


def test_a_move_that_fails_is_no_failure_of_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, TRIAL)  # the start's weights have learned
    result = learned((0, 4, 5), moves=4)
    assert isinstance(result.failure, LossNotFinite), "of the weights that go on"
    assert " of 4 moves, " in result.schedule.note and math.isfinite(result.psnr)


# ---- processes

TOGETHER = {"iterations": 4, "batch": 4, "pool": 8, "validation": 5, "every": 2}


def learn_together(minutes: float | None = None) -> Learned:
    task = make_task()
    starts = [plan(task, computed) for computed in ((0, 4, 5), (0, 3, 5))]
    return learn(task, starts, WeightSettings(**TOGETHER), minutes, moves=2)


def distributed(rank: int, folder: Path) -> None:
    """One of two processes, which saves what it ended with."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    learning.TRIAL, Task.held_out = TRIAL, HELD_OUT
    learn_together().schedule.save(folder / f"{rank}.json")
    learn_together(minutes=0.01).schedule.save(folder / f"minutes-{rank}.json")
    with pytest.raises(ValueError, match="batch: expected a multiple of 2 processes x 1 parts, got 3"):
        learn(make_task(), [plan(make_task())], WeightSettings(batch=3, pool=3))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.train.test_learn", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_learn_as_one(two_processes: Path) -> None:
    first, second = (Schedule.load(two_processes / f"{rank}.json") for rank in range(2))
    one = learn_together().schedule
    assert np.array_equal(first.compute, second.compute) and np.array_equal(first.compute, one.compute)
    np.testing.assert_array_equal(first.weights, second.weights)
    assert abs(one.weights - one.replace(weights=None).weights).max() > 0.02, "far above the tolerance"
    np.testing.assert_allclose(first.weights, one.weights, atol=2e-3)


def test_processes_agree_on_when_time_is_up(two_processes: Path) -> None:
    first, second = (Schedule.load(two_processes / f"minutes-{rank}.json") for rank in range(2))
    assert first.replace(note="") == second.replace(note="")


if __name__ == "__main__":
    torch.multiprocessing.start_processes(distributed, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
