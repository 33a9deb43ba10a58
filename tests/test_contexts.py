"""Several calls a step: contexts by name and order, that end, begin and halve midway, with schedules of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import harmonica_rt as hrt

from .conftest import Calls, assert_close, make_dit

STEPS = 7
LEVELS = ["branches", "blocks", "output"]
levels = pytest.mark.parametrize("level", LEVELS)
ways = pytest.mark.parametrize("named", [True, False])


def schedule_of(model: nn.Module, level: str, every: int = 3, **fields: Any) -> hrt.Schedule:
    return hrt.Schedule.uniform(model, STEPS, every, level=level, **fields)


def alone(model: nn.Module, schedule: hrt.Schedule, calls: Calls, steps: Iterable[int]) -> dict[int, torch.Tensor]:
    """What a context's own run gives: nothing else is called between."""
    first = min(steps)
    fast = hrt.compile(model, schedule.starting_at(first), backend="eager")
    return {step: calls.call(fast, step) for step in steps}


def contexts(name: str, named: bool, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    return model.cache_context(name) if named else contextlib.nullcontext()


@pytest.fixture
def calls() -> tuple[Calls, Calls]:
    """A conditional and an unconditional call of each step: the same samples, other labels."""
    one, other = Calls(STEPS), Calls(STEPS)
    other.labels = torch.full_like(other.labels, 5)
    return one, other


@levels
@ways
@pytest.mark.parametrize("known", [True, False])
def test_each_context_has_values_of_its_own(
    dit: nn.Module, calls: tuple[Calls, Calls], level: str, named: bool, known: bool
) -> None:
    schedule = schedule_of(dit, level, timesteps=calls[0].timesteps if known else None)
    fast = hrt.compile(dit, schedule, backend="eager")
    wanted = [alone(dit, schedule, own, range(STEPS)) for own in calls]
    for _ in range(2):  # runs
        for step in range(STEPS):
            for name, own, want in zip(("cond", "uncond"), calls, wanted):
                with contexts(name, named, fast):
                    assert_close([own.call(fast, step)], [want[step]], 1e-6)
    assert [plan.context for plan in fast.report().plans] == (["cond", "uncond"] if named else [0, 1])


@levels
@ways
def test_a_context_may_end_and_begin_midway(
    dit: nn.Module, calls: tuple[Calls, Calls], level: str, named: bool
) -> None:
    """A guidance interval: the unconditional call is made at steps 2 to 4; at its first it computes everything."""
    schedule = schedule_of(dit, level, timesteps=calls[0].timesteps)
    fast = hrt.compile(dit, schedule, backend="eager")
    wanted = [alone(dit, schedule, calls[0], range(STEPS)), alone(dit, schedule, calls[1], range(2, 5))]
    for _ in range(2):
        for step in range(STEPS):
            for name, own, want in zip(("cond", "uncond"), calls, wanted):
                if step in want:
                    with contexts(name, named, fast):
                        assert_close([own.call(fast, step)], [want[step]], 1e-6)


@levels
def test_a_context_that_pauses_starts_again(dit: nn.Module, calls: tuple[Calls, Calls], level: str) -> None:
    schedule = schedule_of(dit, level, timesteps=calls[0].timesteps)
    fast = hrt.compile(dit, schedule, backend="eager")
    early = alone(dit, schedule, calls[1], range(2))
    late = alone(dit, schedule, calls[1], range(5, STEPS))
    for step in range(STEPS):
        with fast.cache_context("cond"):
            calls[0].call(fast, step)
        if step in {**early, **late}:
            with fast.cache_context("uncond"):
                assert_close([calls[1].call(fast, step)], [{**early, **late}[step]], 1e-6)


@levels
@pytest.mark.parametrize("kept", [0, 1])
def test_half_a_batch_goes_on_with_its_values(dit: nn.Module, level: str, kept: int) -> None:
    """Guidance in one batch is cut off: the other half's values are kept, whichever half it is."""
    both = Calls(STEPS, batch=4)
    both.labels = torch.tensor([0, 1, 5, 5])
    half = Calls(STEPS, batch=2)
    half.samples = both.samples.chunk(2, 1)[kept].contiguous()
    half.labels = both.labels.chunk(2)[kept]
    schedule = schedule_of(dit, level, timesteps=both.timesteps)
    fast = hrt.compile(dit, schedule, backend="eager")
    want = alone(dit, schedule, half, range(STEPS))
    for _ in range(2):
        for step in range(4):  # step 4 reuses
            assert_close([both.call(fast, step).chunk(2)[kept]], [want[step]], 1e-5)
        for step in range(4, STEPS):
            assert_close([half.call(fast, step)], [want[step]], 1e-5)


@levels
def test_a_batch_that_is_no_half_is_refused(dit: nn.Module, level: str) -> None:
    fast = hrt.compile(dit, schedule_of(dit, level), backend="eager")
    both, other = Calls(STEPS, batch=4), Calls(STEPS, batch=2)
    both.labels, other.labels = torch.tensor([0, 1, 5, 5]), torch.tensor([3, 3])
    both.call(fast, 0)
    with pytest.raises(ValueError, match=r"the run under way has samples of .*, got .*: call reset\(\) to change"):
        other.call(fast, 1)
    assert both.call(fast, 1).shape[0] == 4, "nothing was lost"


@levels
def test_contexts_may_have_schedules_of_their_own(dit: nn.Module, calls: tuple[Calls, Calls], level: str) -> None:
    schedules = {"cond": schedule_of(dit, level, 2), "uncond": schedule_of(dit, level, 3)}
    fast = hrt.compile(dit, schedules, backend="eager")
    wanted = [alone(dit, schedule, own, range(STEPS)) for schedule, own in zip(schedules.values(), calls)]
    for step in range(STEPS):
        for name, own, want in zip(schedules, calls, wanted):
            with fast.cache_context(name):
                assert_close([own.call(fast, step)], [want[step]], 1e-6)
    with fast.cache_context("third"), pytest.raises(ValueError, match=r"expected one of \('cond', 'uncond'\).*'third'"):
        calls[0].call(fast, 0)
    with pytest.raises(ValueError, match="got a call outside of cache_context"):
        calls[0].call(fast, 0)


def test_schedules_of_contexts_agree(dit: nn.Module) -> None:
    a, b = schedule_of(dit, "blocks"), hrt.Schedule.uniform(dit, STEPS + 1, level="blocks")
    with pytest.raises(ValueError, match="expected the same steps in all contexts, got 7 and 8"):
        hrt.compile(dit, {"cond": a, "uncond": b})
    with pytest.raises(ValueError, match="expected the same level in all contexts, got blocks and output"):
        hrt.compile(dit, {"cond": a, "uncond": schedule_of(dit, "output")})
    with pytest.raises(ValueError, match="at least one context, got an empty mapping"):
        hrt.compile(dit, {})
    with pytest.raises(TypeError, match=r"expected a harmonica_rt.Schedule, got str"):
        hrt.compile(dit, {"cond": "file.json"})


def test_a_told_step_index_goes_before_counting(dit: nn.Module) -> None:
    """As newer pipelines pass it: timesteps may then be in any units."""
    rising = Calls(STEPS)
    rising.timesteps = rising.timesteps[::-1]
    want = alone(dit, schedule_of(dit, "blocks", timesteps=rising.timesteps), rising, range(STEPS))
    fast = hrt.compile(dit, schedule_of(dit, "blocks"))
    for step in range(STEPS):
        with fast.cache_context("cond", step_index=step, sigma=0.5):
            assert_close([rising.call(fast, step)], [want[step]], 1e-6)


def test_a_sigma_stands_for_a_timestep_that_cannot_be_read(dit: nn.Module) -> None:
    """Here none is: the model is told none."""

    class Untimed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4), nn.Tanh())]
            )

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](sample))

    model = Untimed().eval()
    fast = hrt.compile(model, hrt.Schedule.uniform(model, 4, 2))
    sigmas, x = (0.9, 0.6, 0.3, 0.1), torch.randn(4, 2, 4)
    for _ in range(2):
        for step, sigma in enumerate(sigmas):
            for name in ("cond", "uncond"):
                with fast.cache_context(name, sigma=sigma):
                    output = fast(x[step])
                assert torch.equal(output, model(x[step])) == (step % 2 == 0), (step, name)
    with fast.cache_context("cond", sigma=0.9):
        assert torch.equal(fast(x[0]), model(x[0])), "a rise starts a run"


def test_a_new_run_begins_for_all_contexts(dit: nn.Module, calls: tuple[Calls, Calls]) -> None:
    """One cut short between the two calls of a step leaves nothing behind."""
    schedule = schedule_of(dit, "blocks", timesteps=calls[0].timesteps)
    fast = hrt.compile(dit, schedule)
    wanted = [alone(dit, schedule, own, range(STEPS)) for own in calls]
    for stop in range(1, 2 * STEPS):
        names, done = ("cond", "uncond"), 0
        noise = Calls(STEPS, seed=stop)
        while done < stop:
            with fast.cache_context(names[done % 2]):
                noise.call(fast, done // 2)
            done += 1
        fast.reset()
        for step in range(STEPS):
            for name, own, want in zip(names, calls, wanted):
                with fast.cache_context(name):
                    assert_close([own.call(fast, step)], [want[step]], 1e-6)


def test_another_prompt_on_the_same_noise_is_not_taken_for_the_run_cut_short(dit: nn.Module) -> None:
    """Without names, a run that ended after its first step looks like another context of it: told apart by labels."""
    fast = hrt.compile(dit, schedule_of(dit, "blocks"))
    one, other = Calls(STEPS), Calls(STEPS)
    other.labels = torch.full_like(other.labels, 2)
    want = alone(dit, schedule_of(dit, "blocks"), other, range(STEPS))
    one.call(fast, 0)
    for step in range(STEPS):
        assert_close([other.call(fast, step)], [want[step]], 1e-6)


def test_plans_are_kept_for_each_context(calls: tuple[Calls, Calls]) -> None:
    model = make_dit()
    fast = hrt.compile(model, schedule_of(model, "blocks"), plans=1)
    for step in range(STEPS):
        for name, own in zip(("cond", "uncond"), calls):
            with fast.cache_context(name):
                own.call(fast, step)
    assert len(fast.report().plans) == 2
    assert "context uncond" in str(fast.report())
