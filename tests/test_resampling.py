"""Schedules carried to another number of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt import Schedule
from harmonica_rt.checks import may_carry
from harmonica_rt.forecast import unlearned_carry

from .conftest import make_dit
from .test_channels import LEVELS, random_channels

MODEL = make_dit()
STEPS = st.integers(1, 40)
LEVEL = st.sampled_from(sorted(LEVELS))


@st.composite
def schedules(draw: Any) -> Schedule:
    """Of any level and pattern, with steps that reuse the output, and random weights and carries."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    level, order = draw(LEVEL), draw(st.integers(0, 2))
    options = {"level": "output"} if level == "output" else LEVELS[level]
    schedule = Schedule.full(MODEL, draw(STEPS), order=order, **options)
    output = rng.random(schedule.steps) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    output[0] = False
    often = draw(st.sampled_from([0.1, 0.5, 0.9]))
    compute = (rng.random(schedule.compute.shape) < often) & ~output.reshape(-1, *(1,) * (schedule.compute.ndim - 1))
    compute = compute if schedule.groups else np.zeros((schedule.steps, 0), dtype=bool)
    compute[0] = True
    schedule = schedule.replace(compute=compute, output=output)
    reused = ~compute & ~schedule.output.reshape(-1, *(1,) * (compute.ndim - 1))
    fields = {"carry": np.where(reused, rng.random(compute.shape), 0.0)} if schedule.level == "blocks" else {}
    if draw(st.booleans()):
        fields["weights"] = schedule.weights * rng.normal(1, 0.3, schedule.weights.shape)
        fields["output_weights"] = schedule.output_weights * 1.25
    return schedule.replace(**fields)


@given(schedules())
def test_the_same_number_of_steps_is_the_same_schedule(schedule: Schedule) -> None:
    assert schedule.between(schedule.steps) is schedule
    assert schedule.between(schedule.steps, note="mine") == schedule.replace(note="mine")


@given(schedules(), STEPS)
def test_another_number_computes_as_much_of_the_run(schedule: Schedule, steps: int) -> None:
    """An entry's count is the nearest there is, but that step 0 computes and no more steps than there are run."""
    carried = schedule.between(steps)
    assert carried.steps == steps and carried.level == schedule.level and carried.groups == schedule.groups
    assert carried.learned == (schedule.learned and steps == schedule.steps)
    off = 1.0 if schedule.output.any() else 0.5  # steps that run are rounded first
    off = off / steps + 1e-9
    for was, now in [(~schedule.output[:, None], ~carried.output[:, None]), (schedule.compute, carried.compute)]:
        was, now = was.reshape(schedule.steps, -1).mean(0), now.reshape(steps, -1).mean(0)
        assert np.all((np.abs(now - was) <= off) | (now * steps == 1) & (was <= 1 / steps))


@given(schedules(), STEPS)
def test_carries_come_from_the_nearest_step(schedule: Schedule, steps: int) -> None:
    carried = schedule.between(steps)
    if schedule.learned and steps != schedule.steps:
        alone = carried.compute | carried.left_alone
        usual = unlearned_carry(carried.groups, carried.order, carried.guidance_scale)
        assert np.array_equal(
            carried.carry, np.where(may_carry(alone, carried.groups, carried.level) & ~alone, usual, 0.0)
        )
        return
    old = np.argwhere(schedule.carry)
    for step, *entry in np.argwhere(carried.carry):
        own = old[(old[:, 1:] == entry).all(1)][:, 0]
        off = np.abs(own / schedule.steps - step / steps)
        nearest = own[off <= off.min() + 1e-9]
        assert carried.carry[(step, *entry)] in [schedule.carry[(i, *entry)] for i in nearest]
    if schedule.carry.any():
        assert carried.carry[~carried.compute & ~carried.output.reshape(-1, *(1,) * (carried.compute.ndim - 1))].all()


@pytest.mark.parametrize("every", [2, 3, 4])
@pytest.mark.parametrize(("was", "steps"), [(28, 20), (50, 28), (20, 50), (24, 12)])
@pytest.mark.parametrize("level", sorted(LEVELS))
def test_uniform_stays_uniform(was: int, steps: int, every: int, level: str) -> None:
    options = {"level": "output"} if level == "output" else LEVELS[level]
    carried = Schedule.uniform(MODEL, was, every, **options).between(steps)
    computed = ~carried.output if level == "output" else carried.compute[:, 0, 0]
    assert set(np.diff(np.flatnonzero(computed))) <= {every - 1, every, every + 1}
    if was % every == 0 and steps % every == 0:
        whole = Schedule.uniform(MODEL, steps, every, **options)
        assert np.array_equal(carried.compute, whole.compute) and np.array_equal(carried.carry, whole.carry)
        assert np.array_equal(carried.output, whole.output)


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_learned_weights_stay_behind_and_the_note_says_so(level: str) -> None:
    schedule = random_channels(MODEL, level).replace(
        sampler="DDIMScheduler", timesteps=range(7, 0, -1), guidance_scale=2.0, note="learned"
    )
    carried = schedule.between(12)
    assert schedule.learned and not carried.learned and carried.channels is None and carried.output_channels is None
    assert carried.note == "learned, carried from 7 steps, not learned"
    assert (carried.sampler, carried.guidance_scale, carried.order) == ("DDIMScheduler", 2.0, 1)
    options = {"level": "output"} if level == "output" else LEVELS[level]
    assert set(np.unique(carried.carry)) <= {0.0, Schedule.uniform(MODEL, 12, **options).carry.max(initial=0.0)}
    assert carried.timesteps is None and carried.log_snr is None
    assert carried.between(10).note.endswith("carried from 7 steps, not learned, carried from 12 steps, not learned")
    told = schedule.between(12, timesteps=range(12, 0, -1), note="mine")
    assert told.timesteps == tuple(range(12, 0, -1)) and told.note == "mine"


def test_what_cannot_be_carried_is_refused() -> None:
    schedule = Schedule.uniform(MODEL, 4, 2, timesteps=[4, 3, 2, 1])
    for bad in (0, -1, 2.0, True, "4"):
        with pytest.raises(ValueError, match="steps: expected a positive integer, got"):
            schedule.between(bad)
    with pytest.raises(TypeError, match="unknown field 'speed'"):
        schedule.between(8, speed=2)
    with pytest.raises(ValueError, match="forecast 'timestep': expected timesteps, got none"):
        schedule.replace(forecast="timestep").between(8)
    assert schedule.replace(forecast="timestep").between(2, timesteps=[4, 2]).forecast == "timestep"
