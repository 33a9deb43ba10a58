"""`harmonica learn` on the end error: what it writes, and what it refuses."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import harmonica_rt.train.learn as learning
import harmonica_rt.train.run as running
from harmonica_rt import Schedule
from harmonica_rt.train.budget import Budget, Costs
from harmonica_rt.train.natural_gradient import NaturalGradient
from harmonica_rt.train.starts import TaskStarts as Starts
from harmonica_rt.train.task import Task

from ..conftest import make_dit
from .commands import SPEEDUP, TARGET, learn, learn_end, refused, run, succeeded
from .conftest import make_task


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRIAL", 2)
    monkeypatch.setattr(Task, "held_out", 4)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Its precision is the process's."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--moves", "1"),
        ("--target", "converged", "--order", "1"),
        ("--tie", "branch", "--accumulate", "2", "--checkpointing", "--sampler", "dpmsolver++", "--guidance", "1"),
        ("--dtype", "bfloat16", "--init", "uniform:2"),
        ("--init", "uniform:2", "--order", "0"),
    ],
    ids=str,
)
def test_learn_on_the_end_error(model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "s.json"
    text = succeeded(learn_end(model, out, *options))
    schedule = Schedule.load(out)
    assert text == f"wrote {out}: {schedule!r}\n{schedule.note}\n"
    assert schedule.speedup(make_dit()) >= 1.5 and schedule.learned
    assert schedule.sampler == ("DPMSolverMultistepScheduler" if "dpmsolver++" in options else "DDIMScheduler")
    given = dict(pairwise(options))
    assert schedule.order == int(given.get("--order", 2)) and schedule.timesteps is not None
    assert f"target {given.get('--target', 'full')}: " in schedule.note
    assert (" of 1 moves, " in schedule.note) == ("--moves" in options)
    if "--init" not in options:
        assert schedule.speedup(make_dit()) == pytest.approx(1.5, rel=0.05)
    else:
        assert np.array_equal(schedule.compute, Schedule.uniform(make_dit(), 6).compute)
    if "branch" in options:
        change = schedule.weights - schedule.replace(weights=None).weights
        assert np.allclose(change[5, :2], change[5, :1]) and change[5].any(), "layers share"


@pytest.mark.usefixtures("short")
def test_learn_weights_of_reused_outputs(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    succeeded(learn_end(model, out, "--init", "output:2", "--classes", "0,2"))
    schedule = Schedule.load(out)
    assert schedule.output.tolist() == [False, True] * 3 and schedule.compute[::2].all()
    assert not np.allclose(schedule.output_weights, schedule.replace(output_weights=None).output_weights)


@pytest.mark.usefixtures("short", "fresh_accelerator")
def test_learn_on_the_end_error_in_mixed_precision(model: Path, tmp_path: Path) -> None:
    succeeded(learn_end(model, tmp_path / "s.json", "--mixed-precision", "bf16", "--init", "uniform:2"))
    assert Schedule.load(tmp_path / "s.json").learned


@pytest.mark.usefixtures("short")
def test_learn_on_a_budget_of_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "seconds", lambda task: Costs(np.tile([2.0, 0.0], 3), 3.0))  # 6 of 9 s are attention
    out = tmp_path / "s.json"
    succeeded(learn_end(model, out, "--budget", "time"))
    schedule = Schedule.load(out)
    faster = 6 * 9 / (6 * 3 + 2 * schedule.compute[..., 0].sum())
    assert 1.5 <= faster < 1.6 and schedule.speedup(make_dit()) > 1.7, "of time, not of MACs"
    refused(learn_end(model, out, "--budget", "time", "--target-speedup", "2.5"), "expected 1.00 to 2.25 for 6 steps")


@pytest.mark.usefixtures("short")
def test_learn_from_a_files_weights(model: Path, tmp_path: Path) -> None:
    start, out = tmp_path / "start.json", tmp_path / "s.json"
    uniform = Schedule.uniform(make_dit(), 6, 3)
    given = uniform.replace(weights=0.7 * uniform.weights, sampler="DDIMScheduler", note="before")
    given.save(start)
    succeeded(learn_end(model, out, "--init", start, "--lr", "1e-9", "--guidance", "2", target=()))
    schedule = Schedule.load(out)
    assert np.array_equal(schedule.compute, given.compute) and schedule.order == 1
    np.testing.assert_allclose(schedule.weights, given.weights, atol=1e-6)
    assert schedule.guidance_scale == 2 and schedule.timesteps is not None and "before" not in schedule.note


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("moves", [(), ("--moves", "9999")], ids=str)
def test_learn_for_some_time(model: Path, tmp_path: Path, moves: tuple[str, ...]) -> None:
    out, log = tmp_path / "s.json", tmp_path / "log"
    options = (*SPEEDUP, "--steps", "6", "--batch", "2", "--pool", "2", "--minutes", "0.02", "--log", log, *moves)
    succeeded(run("learn", "--model", model, "--out", out, *options))
    assert Schedule.load(out).learned and any(log.rglob("events.out.tfevents.*"))
    assert ("moves" in Schedule.load(out).note) == bool(moves)


@pytest.mark.usefixtures("short")
def test_a_signal_ends_it_with_what_was_learned(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direction, steps = NaturalGradient.direction, []

    def kill(gradient: NaturalGradient, rows: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return direction(gradient, rows)

    monkeypatch.setattr(NaturalGradient, "direction", kill)
    out, before = tmp_path / "s.json", signal.getsignal(signal.SIGTERM)
    succeeded(learn_end(model, out, "--iterations", "1000", "--init", "uniform:2"))
    assert len(steps) == 3 and Schedule.load(out).learned and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("short")
def test_learning_that_fails_leaves_the_best_schedule(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = Starts.errors
    monkeypatch.setattr(
        Starts, "errors", lambda s, r, *part: errors(s, r, *part) * (torch.nan if r.requires_grad else 1)
    )
    out = tmp_path / "s.json"
    result = learn_end(model, out, "--init", "uniform:2")
    refused(result, "iteration 0: the gradient is not finite", f"{out} is the best schedule until then")
    assert np.array_equal(Schedule.load(out).compute, Schedule.uniform(make_dit(), 6).compute)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--init", "normal"), "init: expected uniform:N, output:N or a schedule file, got normal"),
        (("--init", "uniform:x"), "got 'uniform:x'"),
        (("--init", "output:x"), "got 'output:x'"),
        (("--classes", "0,5"), "classes: expected some from 0 to 4, got [0, 5]"),
        (("--init", "uniform:1", "--target-speedup", "1"), "expected a schedule that reuses something"),
        (("--init", "nowhere.json"), "nowhere.json"),
        (("--init", "uniform:2", "--target-speedup", "2.5"), "meets the target of 2.5, got one of "),
        (("--estimator", "gain"), "--estimator: goes with --objective sdt or l2c, got end"),
        (("--refresh", "2"), "--refresh: goes with --objective sdt or l2c, got end"),
        (("--beta", "1"), "--beta: goes with --objective sdt or l2c, got end"),
        (("--images", "x"), "--images: goes with --objective sdt or l2c, got end"),
        (("--checkpoint", "x", "--resume"), "x: no such checkpoint"),
        (("--router", "x"), "--router: goes with --objective sdt or l2c, got end"),
        (("--paper", "--objective", "end"), "--paper: goes with --objective sdt or l2c, got end"),
        (("--target-speedup", "50"), "target speed-up: expected 1.00 to 3.50 for 6 steps, got 50"),
        (("--target-speedup", "nan"), "target speed-up: expected 1.00 to 3.50 for 6 steps, got nan"),
        (("--target-speedup", "0.9"), "target speed-up: expected 1.00 to 3.50 for 6 steps, got 0.9"),
        (("--target-cur", "0.4"), "expected a target speed-up or a target CUR, got 1.5 and 0.4"),
        (("--minutes", "nan"), "minutes: expected a number above 0, got nan"),
        (("--minutes", "-1"), "minutes: expected a number above 0, got -1"),
        (("--minutes", "0"), "minutes: expected a number above 0, got 0"),
        (("--minutes", "-1", "--moves", "1"), "minutes: expected a number above 0, got -1"),
        (("--pool", "1"), "pool: expected at least a batch of 2, got 1"),
        (("--batch", "0"), "batch: expected at least 1, got 0"),
        (("--accumulate", "3"), "batch: expected a multiple of 3 parts, got 2"),
        (("--iterations", "0"), "iterations: expected at least 1, got 0"),
        (("--lr", "nan"), "lr: expected a number above 0, got nan"),
        (("--sampler", "heun"), "sampler: expected one of ddim, ddpm, iddpm, dpmsolver++"),
    ],
    ids=str,
)
def test_learn_on_the_end_error_refuses(model: Path, tmp_path: Path, options: tuple[str, ...], text: str) -> None:
    refused(learn_end(model, tmp_path / "s.json", *options), text)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ("--target", "full"),
        ("--minutes", "1"),
        ("--moves", "1"),
        ("--tie", "step"),
        ("--pool", "4"),
        ("--accumulate", "1"),
        ("--budget", "macs"),
    ],
    ids=str,
)
@pytest.mark.parametrize("objective", ["sdt", "l2c"])
def test_routers_refuse_what_is_for_the_end_error(
    model: Path, tmp_path: Path, options: tuple[str, str], objective: str
) -> None:
    result = learn(model, tmp_path / "s.json", *options, "--objective", objective)
    refused(result, f"{options[0]}: goes with --objective end, got {objective}")


def test_a_budget_of_time_needs_a_speedup(model: Path, tmp_path: Path) -> None:
    for target in ((), TARGET):
        result = learn_end(model, tmp_path / "s.json", "--budget", "time", target=target)
        refused(result, "--budget time: expected --target-speedup, got none")


def test_learning_on_the_end_error_needs_a_goal(model: Path, tmp_path: Path) -> None:
    result = learn_end(model, tmp_path / "s.json", target=())
    refused(result, "expected a target speed-up, a target CUR or --init, got none")


@pytest.mark.parametrize(
    ("change", "options", "texts"),
    [
        ({"sampler": "DPMSolverMultistepScheduler"}, (), ("sampler expected DDIMScheduler, got DPMSolver",)),
        ({"timesteps": range(6)}, (), ("timesteps expected",)),
        ({}, ("--steps", "5"), ("steps expected 5, got 6",)),
        ({}, ("--order", "0"), ("init: expected a schedule of order 0, got order 1",)),
    ],
    ids=str,
)
def test_learning_on_the_end_error_refuses_starts_of_another_run(
    model: Path, tmp_path: Path, change: dict[str, object], options: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    Schedule.uniform(make_dit(), 6).replace(**change).save(tmp_path / "start.json")
    refused(learn_end(model, tmp_path / "s.json", "--init", tmp_path / "start.json", *options), *texts)


@pytest.mark.parametrize(("option", "value"), [("--tie", "layer"), ("--target", "real"), ("--moves", "-1")])
def test_learning_on_the_end_error_refuses_what_typer_checks(
    model: Path, tmp_path: Path, option: str, value: str
) -> None:
    result = learn_end(model, tmp_path / "s.json", option, value)
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in click.unstyle(result.stderr)


@pytest.mark.parametrize("dear", ["first", "last"])
def test_a_spread_leaves_out_the_layers_that_cost_less(monkeypatch: pytest.MonkeyPatch, dear: str) -> None:
    task = make_task()
    budget = Budget(task.adapter, task.steps, cur=0.4)
    judged = []

    def judge(self: Starts, schedule: Schedule, accelerator: object) -> torch.Tensor:
        judged.append(schedule.compute)
        costs = range(3) if dear == "last" else range(2, -1, -1)  # of leaving out a layer
        return torch.tensor([float((~schedule.compute).sum((0, 2)) @ np.array(costs))])

    monkeypatch.setattr(Starts, "judge", judge)
    assert running._cut_first(task, budget, 2, None) == (dear == "last")
    assert len(judged) == 2 and judged[0].sum() == judged[1].sum()
    assert not running._cut_first(task, Budget(task.adapter, task.steps, cur=0.5), 2, None), "whole steps: no cut"
    assert len(judged) == 2


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("moment", ["judge", "direction"])
def test_a_signal_before_the_first_improvement_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    where, name = {"judge": (Starts, "judge"), "direction": (NaturalGradient, "direction")}[moment]
    stock = getattr(where, name)

    def kill(*arguments: object) -> torch.Tensor:
        monkeypatch.setattr(where, name, stock)
        os.kill(os.getpid(), signal.SIGTERM)
        return stock(*arguments) * (0 if moment == "direction" else 1)  # a step of length 0 is no improvement

    monkeypatch.setattr(where, name, kill)
    out = tmp_path / "s.json"
    result = learn_end(model, out, "--iterations", "1000", "--init", "uniform:2")
    assert result.exit_code == 3 and result.stdout == "", result.output
    message = f"ended early, nothing better than the forecast yet: {out} has the forecast's weights"
    assert result.stderr.splitlines()[-1] == message
    assert not Schedule.load(out).learned and "ended early" in Schedule.load(out).note


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("limit", [("--minutes", "3"), ()], ids=["minutes", "iterations"])
def test_progress_is_a_line_a_phase_without_a_terminal(model: Path, tmp_path: Path, limit: tuple[str, ...]) -> None:
    result = learn_end(model, tmp_path / "s.json", "--moves", "2", *limit)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    phases = [re.split("[:,]", line)[0] for line in lines]
    starts = [phase for phase in phases if phase.startswith("start ")]
    assert starts and phases == ["model", "what to compute", "targets", *starts, "moves", "weights", "verdict"]
    time = r"\d+:\d\d left" if limit else r"(\d+:\d\d left|time left not known yet)"
    for line in lines[2:]:
        assert re.fullmatch(rf"[\w ]+: ([\w ]+, )?iteration \d+, [+-]\d+\.\d\d dB over the forecast, {time}", line), (
            line
        )
    if limit:
        assert lines[1] == "what to compute, 3:00 left"


def test_progress_of_a_router_is_a_line_a_phase(model: Path, tmp_path: Path) -> None:
    lines = learn(model, tmp_path / "s.json").stderr.splitlines()
    unknown = "time left not known yet"
    assert lines[:2] == [f"model: {model}, {unknown}", f"first iteration: 0 of 2 iterations, {unknown}"]
    assert re.fullmatch(r"router: 1 of 2 iterations, loss .*, \d+:\d\d left", lines[2]) and len(lines) == 3
