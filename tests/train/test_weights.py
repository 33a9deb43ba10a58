"""Learned reuse weights: the run against the runtime, gradients against finite differences, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import harmonica_rt as hrt
from harmonica_rt.layout import WHOLE
from harmonica_rt.models import adapt
from harmonica_rt.schedule import Schedule
from harmonica_rt.train.contexts import ContextWeights
from harmonica_rt.train.pipeline_task import PipelineTask
from harmonica_rt.train.reuse import ReuseWeights
from harmonica_rt.train.reusing import CHECKPOINTS
from harmonica_rt.train.starts import Starts, mean
from harmonica_rt.train.trainer import LossNotFinite
from harmonica_rt.train.weights import WeightProgress, WeightSettings, WeightTrainer

from ..conftest import random_schedule, relative_error
from .conftest import make_pipeline_task
from .test_sdt import Peak

SHORT = {"iterations": 12, "batch": 4, "pool": 8, "validation": 4, "every": 4, "lr": 0.02}


def schedule_for(task: PipelineTask, seed: int = 0, order: int = 1, outputs: bool = False) -> Schedule:
    schedule = random_schedule(seed, task.steps, order=order)
    if outputs:
        output = np.zeros(task.steps, dtype=bool)
        output[[2, 4]] = True
        compute = schedule.compute.copy()
        compute[output] = False
        schedule = schedule.replace(compute=compute, output=output)
    return schedule.replace(
        **{k: v for k, v in task.fields().items() if k in ("sampler", "timesteps", "guidance_scale")}
    )


def with_trunk(schedule: Schedule) -> Schedule:
    """The same with the trunk, reused at the steps that compute least, with a carry."""
    steps, groups = schedule.steps, (*schedule.groups, WHOLE)
    compute = np.concatenate([schedule.compute.reshape(steps, -1), ~schedule.output[:, None]], axis=1)
    compute[np.argsort(compute.sum(1) + 100 * schedule.output)[:2]] = False
    compute[0] = True
    kept = {"output": schedule.output, "sampler": schedule.sampler, "timesteps": schedule.timesteps}
    made = Schedule(compute, model=schedule.model, groups=groups, order=schedule.order, **kept)
    assert made.trunk.any()
    carry = np.zeros(compute.shape)
    carry[made.trunk, -1] = np.linspace(0.3, 0.8, made.trunk.sum())
    return made.replace(carry=carry)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("trunk", [False, True])
def test_a_run_is_the_runtimes(order: int, outputs: bool, trunk: bool) -> None:
    task = make_pipeline_task()
    schedule = schedule_for(task, order=order, outputs=outputs)
    schedule = with_trunk(schedule) if trunk else schedule
    task.check(schedule)
    weights = ContextWeights(schedule)
    weights.change.normal_(std=0.2)
    learned, starts = weights.to_schedule(), task.starts("full", 2, 5)
    assert learned.learned
    with torch.no_grad():
        results = [starts.result(schedule, weights(), 0, 2), starts.result(learned, None, 0, 2)]
    expected = run_compiled(task, learned, starts)
    for result in results:
        assert relative_error(result, expected) < 1e-5
    assert relative_error(run_compiled(task, task.unlearned(learned), starts), expected) > 1e-3


def run_compiled(task: PipelineTask, schedule: Schedule, starts: Starts) -> Tensor:
    """By the runtime, from the first two of `starts`."""
    pipeline = hrt.compile(task.sampled.owner, schedule, backend="eager")
    try:
        return pipeline(**starts.generation.arguments([0, 1]), output_type="latent").images
    finally:
        hrt.uncompile(pipeline)


@torch.no_grad()
def test_each_image_can_have_its_own_weights() -> None:
    task = make_pipeline_task()
    weights, starts = ContextWeights(schedule_for(task, outputs=True)), task.starts("full", 3, 5)
    change = 0.1 * torch.randn(3, len(weights.change), generator=torch.Generator().manual_seed(0))
    together = starts.result(weights.schedules, weights(change), 0, 3)
    for i, own in enumerate(change):
        assert relative_error(together[i : i + 1], starts.result(weights.schedules, weights(own), i, i + 1)) < 1e-5


@pytest.mark.parametrize("trunk", [False, True])
def test_checkpointing_changes_no_gradient(trunk: bool) -> None:
    task, gradients = make_pipeline_task(), []
    schedule = schedule_for(task, outputs=True)
    weights, starts = ContextWeights(with_trunk(schedule) if trunk else schedule), task.starts("full", 2, 5)
    change = weights.change.requires_grad_()
    for checkpointing in CHECKPOINTS:
        result = starts.result(weights.schedules, weights(change), 0, 2, checkpointing)
        gradients += torch.autograd.grad(result.square().mean(), change)
    assert (gradients[0] != 0).all(), "what does not exist has no weight"
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-5, atol=1e-8)


def test_steps_fall_to_nothing() -> None:
    task = make_pipeline_task()
    trainer = WeightTrainer(task, schedule_for(task), WeightSettings(**SHORT))
    lengths = []
    for share in (0.0, 0.0, 0.0, 0.0, 0.5, 1.0):
        before = trainer.weights.change.clone()
        trainer._iterate(share)
        trainer.iteration += 1
        lengths.append((trainer.weights.change - before).square().mean().sqrt().item() / trainer.length)
    assert lengths == pytest.approx([1, 1, 1, 1, 0.5, 0], abs=1e-5)


@pytest.mark.parametrize("lr", [30.0, 1e-4])
def test_the_length_of_steps_is_looked_for(lr: float) -> None:
    """On the runs that come next, and again every 10 iterations."""
    task = make_pipeline_task()
    trainer = WeightTrainer(task, uniform(task), WeightSettings(**{**SHORT, "lr": lr}))
    errors: dict[float, float] = {}
    tried = trainer._tried

    def note(change: torch.Tensor) -> float:
        length = (trainer.weights.change - change).square().mean().sqrt().item()
        errors[round(length / lr, 4)] = tried(change)
        return errors[round(length / lr, 4)]

    trainer._tried = note
    trainer._iterate(0.0)
    best = min(errors, key=errors.get)
    assert trainer.length == pytest.approx(lr * best, rel=0.02) and len(errors) > 3
    assert best < 1 if lr > 1 else best > 1
    trainer._tried, count = tried, len(errors)
    learned = trainer.run()
    assert len(errors) == count
    assert judge(trainer.validation, learned) < judge(trainer.validation, uniform(task))


def test_iterations_go_round_the_pool() -> None:
    task, seen = make_pipeline_task(), []
    trainer = WeightTrainer(task, schedule_for(task), WeightSettings(**SHORT, accumulate=2))
    run, trainer._searched = trainer.starts.result, lambda direction: trainer.length
    trainer.starts.result = lambda *own: seen.append(own[2:4]) or run(*own)
    trainer.run()
    assert seen == [(0, 2), (2, 4), (4, 6), (6, 8)] * 6


def test_what_exists_may_change() -> None:
    schedule = schedule_for(make_pipeline_task(), outputs=True)
    weights = ReuseWeights(schedule)
    assert len(weights.change) == np.count_nonzero(schedule.weights) + np.count_nonzero(schedule.output_weights)
    assert weights.to_schedule() == schedule
    weights.change[:] = 1 + torch.arange(len(weights.change))
    learned = weights.to_schedule()
    assert np.array_equal(learned.weights != schedule.weights, schedule.weights != 0), "all that exist, and no others"
    assert np.array_equal(learned.output_weights != 0, schedule.output_weights != 0)


def test_the_trunk_has_weights_of_its_own() -> None:
    schedule = with_trunk(schedule_for(make_pipeline_task(), outputs=True))
    weights = ReuseWeights(schedule)
    weights.change[:] = 1 + torch.arange(len(weights.change))
    changed = (weights.to_schedule().weights - schedule.weights)[:, -1]
    assert np.array_equal(changed != 0, schedule.weights[:, -1] != 0)
    assert len(np.unique(changed[changed != 0])) == np.count_nonzero(changed)


def test_weights_of_the_trunk_are_learned() -> None:
    task = make_pipeline_task()
    schedule = with_trunk(schedule_for(task))
    trainer = WeightTrainer(task, schedule, WeightSettings(**SHORT))
    before = trainer.best.errors.mean()
    learned = trainer.run()
    assert trainer.best.errors.mean() < before
    assert (learned.weights != schedule.weights)[:, -1].any()


def uniform(task: PipelineTask, every: int = 2, order: int = 1) -> Schedule:
    return task.schedule(range(0, task.steps, every), order)


def judge(starts: Starts, schedule: Schedule) -> float:
    return starts.judge(schedule, Accelerator(cpu=True)).mean().item()


@pytest.mark.parametrize("target", ["full", "converged"])
def test_learning_lowers_the_error(target: str) -> None:
    task = make_pipeline_task()
    schedule = uniform(task)
    trainer = WeightTrainer(task, schedule, WeightSettings(target=target, accumulate=2, **SHORT))
    seen = []
    learned = trainer.run(seen.append)
    assert np.array_equal(learned.compute, schedule.compute) and learned.learned
    assert [p.iteration for p in seen] == list(range(1, 13)) and seen[-1].share == 1
    held_out = task.starts(target, 8, 99)
    assert judge(held_out, learned) < judge(held_out, schedule)
    assert seen[0].judged == pytest.approx(judge(trainer.validation, schedule))
    assert seen[-1].judged == pytest.approx(judge(trainer.validation, learned)) and seen[-1].judged < seen[0].judged


@pytest.mark.parametrize("size", [1, 3, 16])
def test_errors_are_decibels_of_each_run(size: int) -> None:
    """Of the target's variance."""
    task = make_pipeline_task(size=size)
    schedule, starts = uniform(task), task.starts("full", 2, 9)
    errors = starts.judge(schedule, Accelerator(cpu=True))
    whole = run_compiled(task, task.full(1), starts)
    error = (run_compiled(task, schedule, starts) - whole).square().mean((1, 2, 3)) / whole.flatten(1).var(1)
    torch.testing.assert_close(errors, 10 * error.log10(), rtol=1e-4, atol=1e-4)
    assert errors.std() > 0.01


def test_the_reported_error_is_of_the_weights_as_they_were() -> None:
    task, seen = make_pipeline_task(), []
    schedule = uniform(task)
    trainer = WeightTrainer(task, schedule, WeightSettings(**{**SHORT, "iterations": 1}))
    errors = trainer.starts.judge(schedule, Accelerator(cpu=True))[:4]
    trainer.run(seen.append)
    assert seen[0].error == pytest.approx(errors.mean().item(), abs=1e-3)


@pytest.mark.parametrize("lr", [0.02, 30.0])
def test_the_best_weights_are_kept(lr: float) -> None:
    task, seen = make_pipeline_task(), []
    schedule = task.schedule(range(task.steps - 1), 1)  # the last hardly reaches the image: long steps do harm
    trainer = WeightTrainer(task, schedule, WeightSettings(**{**SHORT, "lr": lr, "every": 1}))
    trainer._searched = lambda direction: lr
    learned = trainer.run(seen.append)
    judged = [p.judged for p in seen]
    assert judged == sorted(judged, reverse=True)
    assert judge(trainer.validation, learned) == pytest.approx(judged[-1], abs=1e-3)
    start, last = judge(trainer.validation, schedule), judge(trainer.validation, trainer.weights.to_schedule())
    assert judged[-1] < start if lr < 1 else (learned == schedule and last > start + 3)


def test_the_last_weights_are_judged_whatever_every_is() -> None:
    task = make_pipeline_task()
    trainer = WeightTrainer(task, uniform(task), WeightSettings(**{**SHORT, "every": 100}))
    assert trainer.run() == trainer.weights.to_schedule() != uniform(task)


def test_the_same_seed_learns_the_same() -> None:
    task, settings = make_pipeline_task(), {**SHORT, "iterations": 3, "every": 1}
    first, same, other = (
        WeightTrainer(task, uniform(task), WeightSettings(**settings, seed=seed)).run() for seed in (0, 0, 1)
    )
    assert first == same != other


def test_a_successor_shares_the_starts() -> None:
    task = make_pipeline_task()
    trainer = WeightTrainer(task, uniform(task), WeightSettings(**SHORT))
    trainer.run()
    ends = dict(trainer.starts.ends)
    settings = WeightSettings(**{**SHORT, "iterations": 2})
    after = trainer.succeeded_by(trainer.schedule(), settings)
    assert (after.starts, after.validation, after.accelerator) == (
        trainer.starts,
        trainer.validation,
        trainer.accelerator,
    )
    torch.testing.assert_close(after.best.errors, trainer.best.errors, rtol=1e-3, atol=1e-3)
    assert (after.iteration, after.settings) == (0, settings)
    after.run()
    assert after.starts.ends.keys() == ends.keys(), "targets are computed once"
    assert all(after.starts.ends[part] is end for part, end in ends.items())


def test_it_stops_when_asked_to() -> None:
    task, seen = make_pipeline_task(), []
    trainer = WeightTrainer(task, uniform(task), WeightSettings(**SHORT))
    trainer.run(seen.append, lambda: len(seen) == 2)
    assert [p.iteration for p in seen] == [1, 2] and seen[-1].share == pytest.approx(2 / 12)


def test_minutes_end_it() -> None:
    task, seen = make_pipeline_task(), []
    settings = WeightSettings(**{**SHORT, "iterations": 10**6, "minutes": 0.2 / 60})
    trainer = WeightTrainer(task, uniform(task), settings)
    trainer.run(seen.append)
    assert 0.2 <= trainer.seconds < 10 and seen[-1].share == 1
    assert [p.share for p in seen] == sorted(p.share for p in seen)


def test_weights_that_diverge_stop_it() -> None:
    task = make_pipeline_task()
    trainer = WeightTrainer(task, schedule_for(task), WeightSettings(iterations=3, batch=2, pool=2, validation=2))
    before = trainer.schedule()
    trainer.starts.ends[0, 2] = torch.full((2, 2, 8, 8), torch.nan)
    with pytest.raises(LossNotFinite, match="iteration 0: the gradient is not finite"):
        trainer.run()
    assert trainer.schedule() == before


def test_weights_that_diverge_late_leave_the_best_until_then() -> None:
    task = make_pipeline_task()
    trainer = WeightTrainer(task, uniform(task), WeightSettings(**{**SHORT, "pool": 4}))

    def spoil(progress: WeightProgress) -> None:
        if progress.iteration == 5:
            trainer.starts.ends[0, 4] = torch.full((4, 2, 8, 8), torch.nan)

    with pytest.raises(LossNotFinite, match=r"iteration 5: the gradient is not finite .*nan"):
        trainer.run(spoil)
    best = trainer.schedule()
    assert best.learned and np.isfinite(best.weights).all()
    assert judge(trainer.validation, best) < judge(trainer.validation, uniform(task))


def peak(steps: int, checkpointing: str, layers: int = 3) -> int:
    """Bytes a run and its gradient take at most, without the rows of modulation."""
    task = make_pipeline_task(steps=steps, layers=layers, sample_size=16)
    weights, starts = ContextWeights(uniform(task)), task.starts("full", 2, 7)
    change = weights.change.repeat(2, 1).requires_grad_()
    starts.result(weights.schedules, weights(change), 0, 2, checkpointing)  # binds the model
    with Peak() as measured:
        result = starts.result(weights.schedules, weights(change), 0, 2, checkpointing)
        torch.autograd.grad(result.square().sum(), change)
    adapter = adapt(task.sampled.owner.transformer)
    return measured.peak - steps * 4 * adapter.rows * adapter.width * 4


@pytest.mark.parametrize("layers", [3, 6])
def test_checkpointing_keeps_slots_and_samples_alone(layers: int) -> None:
    """8 steps more: what 4 of them compute, [4, 64 tokens, width 16], and the model's sample each, [4, 2, 16, 16]."""
    expected = 4 * 2 * layers * (4 * 64 * 16 * 4) + 8 * (4 * 2 * 16 * 16 * 4)
    grown, all_grown = (peak(16, kept, layers) - peak(8, kept, layers) for kept in ("steps", "none"))
    assert grown == pytest.approx(expected, rel=0.05)
    assert all_grown > 5 * grown


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target": "real"}, "target: expected one of .*, got 'real'"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"batch": 8, "pool": 4}, "pool: expected at least a batch of 8, got 4"),
        ({"lr": 0.0}, "lr: expected a number above 0, got 0.0"),
        ({"minutes": float("nan")}, "minutes: expected a number above 0, got nan"),
        ({"minutes": -1.0}, "minutes: expected a number above 0, got -1.0"),
        ({"power": -1.0}, "power: expected a number of at least 0, got -1.0"),
        ({"power": float("inf")}, "power: expected a number of at least 0, got inf"),
        ({"validation": 0}, "validation: expected at least 1, got 0"),
        ({"batch": 8, "accumulate": 3}, "batch: expected a multiple of 3 parts, got 8"),
    ],
)
def test_settings_are_checked(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WeightSettings(**change)


def test_what_reuses_nothing_has_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="expected a schedule that reuses something"):
        ReuseWeights(make_pipeline_task().full(1))


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_images_have_shares_of_the_mean_errors_gradient(power: float) -> None:
    task = make_pipeline_task()
    trainer = WeightTrainer(task, schedule_for(task), WeightSettings(power=power, **SHORT))
    errors = torch.tensor([-30.0, -22.0, -25.0, -40.0], dtype=torch.float64, requires_grad=True)
    squared = 10 ** (errors * power / 10)
    pooled = 10 / power * torch.log10(squared.mean())
    assert mean(errors.detach(), power) == pytest.approx(pooled.item())
    (gradient,) = torch.autograd.grad(pooled, errors)
    torch.testing.assert_close(trainer._shares(errors.detach()), gradient)


def test_without_a_power_all_images_count_alike() -> None:
    errors = torch.tensor([-30.0, -22.0, -25.0])
    assert mean(errors) == pytest.approx(mean(errors, 1e-6), abs=1e-3)
    assert mean(errors, 200.0) == pytest.approx(-22.0, abs=0.1), "the worst alone"
    assert mean(torch.tensor([-4000.0, -4000.0]), 3.0) == -4000.0, "nothing overflows"


def test_a_power_is_what_the_best_weights_are_judged_by() -> None:
    task = make_pipeline_task()
    trainer = WeightTrainer(task, schedule_for(task), WeightSettings(power=2.0, **SHORT))
    before = trainer.best.mean
    assert before == pytest.approx(mean(trainer.best.errors, 2.0))
    trainer.run()
    assert trainer.best.mean < before
    again = WeightTrainer(task, schedule_for(task), trainer.settings, state=trainer.state())
    assert again.best.mean == trainer.best.mean
