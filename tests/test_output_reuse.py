"""Steps that reuse the model's output: schedule, files, lowering and every backend, against module-level reuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse
from harmonica_rt.lowering import lower
from harmonica_rt.program import ReuseOutput

from .conftest import BACKENDS, Calls, assert_close, make_dit, random_schedule

STEPS = (2, 3, 5)


def with_outputs(order: int = 1, learned: bool = False, seed: int = 0) -> hrt.Schedule:
    schedule = random_schedule(seed, steps=7, order=order)
    compute, output = schedule.compute.copy(), np.zeros(7, dtype=bool)
    output[list(STEPS)] = True
    compute[output] = False
    schedule = schedule.replace(compute=compute, output=output)
    if learned:
        rng = np.random.default_rng(seed)
        schedule = schedule.replace(
            weights=schedule.weights * rng.normal(1.0, 0.3, schedule.weights.shape),
            output_weights=schedule.output_weights * rng.normal(1.0, 0.3, schedule.output_weights.shape),
        )
    return schedule


def expected(model: torch.nn.Module, schedule: hrt.Schedule, calls: Calls) -> tuple[list[torch.Tensor], ModuleReuse]:
    reuse = ModuleReuse(model, schedule)
    outputs = calls.run(reuse)
    reuse.remove()
    return outputs, reuse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("learned", [False, True])
def test_equals_module_level_reuse(backend: str, order: int, learned: bool) -> None:
    model, calls, schedule = make_dit(), Calls(7), with_outputs(order, learned, seed=order)
    wanted, reuse = expected(model, schedule, calls)
    assert reuse.outputs_reused == len(STEPS)
    fast = hrt.compile(model, schedule, backend=backend)
    for _ in range(2):
        assert_close(calls.run(fast), wanted, 1e-5)


def test_captured_steps_equal_eager() -> None:
    pytest.importorskip("triton")
    from .test_cuda_graphs import compile_graphs

    model, calls, schedule = make_dit(), Calls(7), with_outputs(learned=True)
    fast, recorders = compile_graphs(model, schedule)
    wanted, _ = expected(model, schedule, calls)
    for _ in range(2):
        assert_close(calls.run(fast), wanted, 1e-5)
    distinct = lower(schedule).distinct_steps
    assert fast.report().plans[0].graphs == distinct
    assert len(recorders[0].graphs) == distinct + 1, "and one for modulation rows"


@pytest.mark.parametrize(("order", "slots"), [(0, 1), (1, 2), (2, 3)])
def test_outputs_take_the_slots_they_need(order: int, slots: int) -> None:
    """Step 5 reads steps 4, 1 and 0 (as far as the order goes)."""
    program = lower(with_outputs(order))
    assert program.outputs == slots
    assert [isinstance(step, ReuseOutput) for step in program.steps] == [i in STEPS for i in range(7)]
    assert program.steps[6].keep is None, "no later step reads it"


def test_such_a_step_costs_nothing_and_launches_its_terms() -> None:
    model, calls, schedule = make_dit(), Calls(7), with_outputs()
    compute = np.ones((7, 3, 2), dtype=bool)
    compute[schedule.output] = False
    schedule = hrt.Schedule.full(model, 7).replace(compute=compute, output=schedule.output)
    assert schedule.speedup(model) == pytest.approx(7 / 4)
    fast = hrt.compile(model, schedule, backend="eager")
    calls.run(fast)
    plan = fast.report().plans[0]
    assert plan.full_macs / plan.macs == pytest.approx(7 / 4)
    assert [plan.launches[i] for i in STEPS] == [1 + 2] * 3
    assert plan.computed + plan.reused == 7 * 6


@pytest.mark.parametrize("learned", [False, True])
def test_round_trip(learned: bool, tmp_path: Path) -> None:
    schedule = with_outputs(learned=learned)
    schedule.save(tmp_path / "s.json")
    assert hrt.Schedule.load(tmp_path / "s.json") == schedule
    assert schedule.learned == learned
    fields = json.loads((tmp_path / "s.json").read_text())
    assert fields["output"] == "0011010"
    assert ("output_weights" in fields) == learned
    assert "=" in str(schedule).splitlines()[-5] and "=" not in str(random_schedule(0)).split("reuse)")[-1]
    schedule.plot(tmp_path / "s.png")


def test_equality_sees_them() -> None:
    schedule = with_outputs()
    assert schedule != with_outputs(learned=True)
    assert schedule != schedule.replace(output=np.zeros(7, dtype=bool))
    assert schedule.replace(output=schedule.output).output_weights.tolist() == schedule.output_weights.tolist()


@pytest.mark.parametrize("first", range(7))
def test_entering_midway(first: int) -> None:
    model, calls = make_dit(), Calls(7)
    schedule = with_outputs(learned=True).replace(timesteps=calls.timesteps)
    late = schedule.starting_at(first)
    assert late.compute[0].all() and not late.output[0]
    fast = hrt.compile(model, schedule, backend="eager")
    part = Calls(7)
    part.samples, part.timesteps = calls.samples[first:], calls.timesteps[first:]
    wanted, _ = expected(model, late, part)
    assert_close(calls.run(fast, first), wanted, 1e-5)
    kept = [i for i in range(first, 7) if schedule.output[i] and first < i]
    for i in kept:
        history = [j for j in range(first, i) if late.output[j - first] == 0][-2:]
        before = [j for j in range(i) if not schedule.output[j]][-2:]
        same = np.array_equal(late.output_weights[i - first], schedule.output_weights[i])
        assert same == (history == before)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"output": np.array([True] + [False] * 6)}, "output: step 0 must compute"),
        ({"output": np.ones(3, bool)}, r"output: expected bool \[7\], got bool \[3\]"),
        ({"output": np.zeros(7)}, r"output: expected bool \[7\], got float64"),
        ({"output": np.arange(7) == 1}, "step 1 reuses the output: expected no branch computed there, got"),
        ({"output_weights": np.zeros((7, 3))}, r"output_weights: expected shape \[7, 2\] for order 1, got \[7, 3\]"),
        (
            {"output_weights": np.ones((7, 2))},
            "expected 0 at step 0, value 0 .that step does not reuse its output",
        ),
        ({"output_weights": np.full((7, 2), np.nan)}, "output_weights: expected finite numbers, got nan at step 0"),
    ],
)
def test_refusals(change: dict, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        with_outputs().replace(**change)


def test_weights_of_branches_are_refused_where_the_output_is_reused() -> None:
    weights = with_outputs().weights.copy()
    weights[2, 0, 0, 0] = 1.0
    with pytest.raises(ValueError, match="weights: expected 0 where the output is reused, got"):
        with_outputs().replace(weights=weights)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"output": "0011"}, "output: expected 7 digits 0 or 1"),
        ({"output": [0, 1]}, "output: expected 7 digits 0 or 1"),
        ({"output_weights": [[1.0]]}, "output_weights: expected 7 lists, got 1"),
        ({"output_weights": [[1.0, "x"]] * 7}, "output_weights: expected numbers"),
        ({"output": "1011010"}, "output: step 0 must compute"),
    ],
)
def test_files_with_wrong_outputs(change: dict, match: str, tmp_path: Path) -> None:
    with_outputs(learned=True).save(tmp_path / "s.json")
    fields = json.loads((tmp_path / "s.json").read_text()) | change
    (tmp_path / "s.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=match):
        hrt.Schedule.load(tmp_path / "s.json")


@pytest.mark.parametrize("channels", [False, True])
def test_reuse_of_the_output_moves_beside_the_branches(channels: bool) -> None:
    """To the same result."""
    model, calls, rng = make_dit(), Calls(7), np.random.default_rng(3)
    plan = hrt.Schedule.uniform(model, 7, 3, 2, level="output", sampler="DDIMScheduler", note="mine")
    plan = plan.replace(output_weights=plan.output_weights * rng.normal(1, 0.2, plan.output_weights.shape))
    if channels:
        drawn = rng.normal(0, 0.05, (*plan.output_weights.shape, 4)).astype(np.float32)
        plan = plan.replace(output_channels=np.where(plan.output_weights[..., None] != 0, drawn, np.float32(0)))
    moved = plan.beside_branches(model)
    assert (moved.level, moved.note, moved.sampler, moved.order) == ("branches", "mine", "DDIMScheduler", 2)
    assert (moved.output == plan.output).all() and (moved.compute == ~plan.output[:, None, None]).all()
    wanted = calls.run(hrt.compile(model, plan, backend="eager"))
    assert_close(calls.run(hrt.compile(model, moved, backend="eager")), wanted, 1e-5)
