"""Learned reuse weights: the run against the runtime, gradients against finite differences, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import harmonica_rt as hrt
from harmonica_rt.schedule import Schedule
from harmonica_rt.train.reuse import ReuseWeights, Reusing, reusing_run
from harmonica_rt.train.task import Task, Trajectory
from harmonica_rt.train.trainer import LossNotFinite
from harmonica_rt.train.weights import Starts, WeightSettings, WeightTrainer, check_schedule, converged, full_run

from ..conftest import make_dit, random_schedule, relative_error
from .conftest import STEPS, ddim, make_task


def schedule_for(task: Task, seed: int = 0, order: int = 1, outputs: bool = False) -> Schedule:
    schedule = random_schedule(seed, task.steps, order=order)
    if outputs:
        output = np.zeros(task.steps, dtype=bool)
        output[[2, 4]] = True
        compute = schedule.compute.copy()
        compute[output] = False
        schedule = schedule.replace(compute=compute, output=output)
    return schedule.replace(**{k: v for k, v in task.fields().items() if k not in ("model", "branches")})


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("outputs", [False, True])
def test_a_run_is_the_runtimes(order: int, outputs: bool) -> None:
    task = make_task()
    schedule = schedule_for(task, order=order, outputs=outputs)
    weights = ReuseWeights(schedule)
    weights.change.normal_(std=0.2)
    learned = weights.to_schedule()
    assert learned.learned
    batch = task.draw(2, 5)
    with torch.no_grad():
        got = Reusing(schedule, weights()).run(Trajectory(task, batch))
    model = hrt.compile(make_dit(), learned, backend="eager")
    labels = torch.cat([*batch.conditional, *batch.unconditional])
    expected = model.trajectory(batch.noise, task.scheduler, task.guidance_scale, class_labels=labels)
    assert relative_error(got, expected) < 1e-5
    assert relative_error(reusing_run(learned, Trajectory(task, batch)), expected) < 1e-5


@pytest.mark.parametrize("outputs", [False, True])
def test_gradients_go_through_the_whole_run(outputs: bool) -> None:
    task = make_task(double=True)
    schedule = schedule_for(task, outputs=outputs)
    weights, batch, h = ReuseWeights(schedule), task.draw(2, 5), 1e-5
    end, change = full_run(task, batch), weights.change.double().requires_grad_()

    def loss() -> torch.Tensor:
        result = Reusing(schedule, weights(change)).run(Trajectory(task, batch))
        return (result - end).square().mean().log()

    (gradient,) = torch.autograd.grad(loss(), change)
    assert (gradient != 0).all(), "what does not exist has no weight"
    for place in range(0, len(change), max(1, len(change) // 8)):
        values = []
        for difference in (h, -h):
            with torch.no_grad():
                change[place] += difference
                values.append(loss().item())
                change[place] -= difference
        assert gradient[place].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-3, abs=1e-7)


def test_each_image_can_have_its_own_weights() -> None:
    task = make_task()
    weights, batch = ReuseWeights(schedule_for(task, outputs=True)), task.draw(3, 5)
    change = 0.1 * torch.randn(3, len(weights.change), generator=torch.Generator().manual_seed(0))
    together = Reusing(weights.schedule, weights(change)).run(Trajectory(task, batch))
    for i, own in enumerate(change):
        alone = Reusing(weights.schedule, weights(own)).run(Trajectory(task, batch.part(i, i + 1)))
        assert relative_error(together[i : i + 1], alone) < 1e-5


def test_checkpointing_changes_no_gradient() -> None:
    task, gradients = make_task(), []
    schedule = schedule_for(task, outputs=True)
    for checkpointing in (False, True):
        weights = ReuseWeights(schedule)
        change = weights.change.requires_grad_()
        result = Reusing(schedule, weights(change), checkpointing).run(Trajectory(task, task.draw(2, 5)))
        gradients += torch.autograd.grad(result.square().mean(), change)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("tie", "axes"), [("none", ()), ("branch", (1,)), ("step", (1, 2))])
def test_ties(tie: str, axes: tuple[int, ...]) -> None:
    schedule = schedule_for(make_task(), outputs=True)
    weights = ReuseWeights(schedule, tie)
    free = schedule.weights != 0
    assert len(weights.change) == free.any(axes).sum() + np.count_nonzero(schedule.output_weights)
    assert weights.to_schedule() == schedule
    weights.change[:] = 1 + torch.arange(len(weights.change))
    learned = weights.to_schedule()
    changed = learned.weights - schedule.weights
    assert np.array_equal(changed != 0, free), "all that exist, and no others"
    highest = changed.max(axes, keepdims=True) * np.ones_like(changed)
    assert np.allclose(changed[free], highest[free])
    assert np.array_equal(learned.output_weights != 0, schedule.output_weights != 0)


@pytest.mark.parametrize("target", ["full", "converged"])
def test_learning_lowers_the_error(target: str) -> None:
    task = make_task()
    schedule = Schedule.uniform(task.model, STEPS, 2, **{k: task.fields()[k] for k in ("sampler", "timesteps")})
    settings = WeightSettings(target=target, iterations=12, batch=4, pool=8, accumulate=2, lr=0.02)
    seen = []
    learned = WeightTrainer(task, schedule, settings).run(seen.append)
    assert np.array_equal(learned.compute, schedule.compute) and learned.learned
    assert [p.iteration for p in seen] == list(range(1, 13)) and seen[-1].share == 1

    held_out = Starts(task, target, 8, 99)
    assert held_out.judge(learned, 4).mean() < held_out.judge(schedule, 4).mean()
    assert seen[-1].gained > 0 and seen[0].gained == pytest.approx(0, abs=1e-4)


def test_weights_that_diverge_stop_it() -> None:
    task = make_task()
    trainer = WeightTrainer(task, schedule_for(task), WeightSettings(iterations=3, batch=2, pool=2))
    before = trainer.schedule()
    trainer.starts.ends[0, 2] = torch.full((2, 2, 8, 8), torch.nan)
    with pytest.raises(LossNotFinite, match="iteration 0: the gradient is not finite"):
        trainer.run()
    assert trainer.schedule() == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target": "real"}, "target: expected one of .*, got 'real'"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"batch": 8, "pool": 4}, "pool: expected at least a batch of 8, got 4"),
        ({"lr": 0.0}, "lr: expected a number above 0, got 0.0"),
        ({"minutes": float("nan")}, "minutes: expected a number above 0, got nan"),
        ({"tie": "layer"}, "tie: expected one of .*, got 'layer'"),
        ({"batch": 8, "accumulate": 3}, "batch: expected a multiple of 3 parts, got 8"),
    ],
)
def test_settings_are_checked(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WeightSettings(**change)


def test_schedules_of_another_task_are_refused() -> None:
    task = make_task()
    fitting = schedule_for(task)
    check_schedule(task, fitting)
    for change, match in [
        ({"sampler": "DPMSolverMultistepScheduler"}, "sampler expected DDIMScheduler, got DPMSolver"),
        ({"timesteps": tuple(range(STEPS))}, "timesteps expected"),
    ]:
        with pytest.raises(ValueError, match=match):
            check_schedule(task, fitting.replace(**change))
    with pytest.raises(ValueError, match="steps expected 6, got 5"):
        WeightTrainer(task, random_schedule(0, 5), WeightSettings())
    with pytest.raises(ValueError, match="expected a schedule that reuses something"):
        ReuseWeights(Schedule.full(task.model, STEPS))
    with pytest.raises(ValueError, match="tie: expected one of"):
        ReuseWeights(fitting, "layer")


def test_a_sampler_that_draws_noise_has_no_converged_run() -> None:
    config = {k: ddim().config[k] for k in ("beta_start", "beta_end", "beta_schedule")}
    task = Task(make_dit(), DDPMScheduler(**config), STEPS)
    with pytest.raises(ValueError, match="expected a deterministic sampler of"):
        converged(task)
