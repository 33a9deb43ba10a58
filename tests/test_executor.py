"""What a plan does, counted: launches, bytes, no work for reused branches."""

from __future__ import annotations

import pytest
import torch

import harmonica_rt as hrt
from bench.measure.launches import CountLaunches
from harmonica_rt.lowering import lower

from .conftest import BACKENDS, Calls, make_dit, random_schedule


@pytest.mark.parametrize("seed", range(4))
def test_launches_are_as_reported(seed: int) -> None:
    model, calls = make_dit(), Calls(6)
    schedule = random_schedule(seed, order=seed % 3).replace(timesteps=calls.timesteps)
    fast = hrt.compile(model, schedule, backend="eager")
    calls.run(fast)
    plan = next(iter(fast._plans.values()))
    counted = []
    for step in range(6):
        with CountLaunches() as counter, torch.no_grad():
            plan.run(step, calls.samples[step])
        counted.append(counter.count)
    assert tuple(counted) == fast.report().plans[0].launches


def test_a_step_that_reuses_everything_runs_only_its_terms() -> None:
    model, calls = make_dit(4), Calls(4)
    fast = hrt.compile(model, hrt.Schedule.uniform(model, 4, every=2, order=0), backend="eager")
    calls.run(fast)
    launches = fast.report().plans[0].launches
    ends, norm = 4, 2
    assert launches[1] == launches[3] == ends + norm + 8, "one addcmul a reused branch"
    assert launches[0] == launches[2] == ends + 9 * norm + 8 + 8 * 3, "per branch: two GEMMs and what is between"


def test_fewer_launches_than_diffusers() -> None:
    model, calls = make_dit(), Calls(1)
    with CountLaunches() as theirs:
        calls.run(model)
    fast = hrt.compile(model, hrt.Schedule.full(model, 1), backend="eager")
    calls.run(fast)
    assert fast.report().plans[0].launches[0] < theirs.count / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_slot_memory_is_the_programs(backend: str) -> None:
    model, calls = make_dit(), Calls(6, batch=3)
    schedule = random_schedule(1, order=2)
    fast = hrt.compile(model, schedule, backend=backend)
    calls.run(fast)
    plan = fast.report().plans[0]
    assert plan.slots == lower(schedule).slots
    assert plan.slot_bytes == plan.slots * 3 * 16 * 16 * 4
    assert plan.macs / plan.full_macs == pytest.approx(1 / schedule.speedup(model))


def test_plans_go_when_uncompiled() -> None:
    model = make_dit()
    fast = hrt.compile(model, random_schedule(1), backend="eager")
    Calls(6).run(fast)
    assert "batch 2, 8x8, float32 on cpu, eager" in str(fast.report())
    fast.uncompile()
    assert fast.report().plans == ()
    assert "no plan made yet" in str(fast.report())


def test_nothing_is_allocated_but_results_of_torch_ops() -> None:
    """A reused step writes into the plan's stream: the slots and rows it reads stay where they are."""
    model, calls = make_dit(), Calls(6)
    fast = hrt.compile(model, random_schedule(1), backend="eager")
    calls.run(fast)
    buffers = next(iter(fast._plans.values())).buffers
    addresses = [t.data_ptr() for t in (buffers.x, buffers.slots, buffers.rows, buffers.scratch)]
    calls.run(fast)
    assert [t.data_ptr() for t in (buffers.x, buffers.slots, buffers.rows, buffers.scratch)] == addresses
