"""Budgets against Schedule's own figures; thresholds; a beta that steers the right way."""

from __future__ import annotations

import numpy as np
import pytest

import harmonica_rt as hrt
from harmonica_rt.models import adapt
from harmonica_rt.train.budget import Beta, Budget, Costs, describe, macs
from harmonica_rt.train.router import Router
from harmonica_rt.train.sdt import pinned_steps

from ..conftest import make_dit, random_schedule

STEPS = 20
MODEL = make_dit()
ADAPTER = adapt(MODEL)
FIELDS = {"model": "DiTTransformer2DModel", "branches": ("attn", "mlp")}


@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_schedule(seed: int) -> None:
    schedule = random_schedule(seed, STEPS)
    flat = schedule.compute.reshape(STEPS, -1)
    assert Budget(ADAPTER, STEPS, speedup=1.5).value(flat) == pytest.approx(schedule.speedup(MODEL), rel=1e-12)
    assert Budget(ADAPTER, STEPS, cur=0.5).value(flat) == pytest.approx(schedule.cur, rel=1e-12)


def test_exactly_one_target() -> None:
    for targets in ({}, {"speedup": 2.0, "cur": 0.5}):
        with pytest.raises(ValueError, match="a target speed-up or a target CUR, got"):
            Budget(ADAPTER, STEPS, **targets)


@pytest.mark.parametrize("speedup", [0.5, -1.0, 1000.0, float("nan"), float("inf")])
def test_a_speedup_out_of_reach_says_what_can_be_had(speedup: float) -> None:
    compute = np.zeros((STEPS, 3, 2), bool)
    compute[0] = True
    most = hrt.Schedule(compute, **FIELDS).speedup(MODEL)
    with pytest.raises(
        ValueError, match=rf"target speed-up: expected 1.00 to {most:.2f} for 20 steps, got {speedup:g}"
    ):
        Budget(ADAPTER, STEPS, speedup=speedup)


@pytest.mark.parametrize("cur", [-0.1, 0.96, float("nan")])
def test_a_cur_out_of_reach_says_what_can_be_had(cur: float) -> None:
    with pytest.raises(ValueError, match=rf"target CUR: expected 0.00 to 0.95 for 20 steps, got {cur:g}"):
        Budget(ADAPTER, STEPS, cur=cur)


def test_pinned_steps_narrow_the_range() -> None:
    pinned = pinned_steps(STEPS, "l2c")
    Budget(ADAPTER, STEPS, cur=0.5, pinned=pinned)
    with pytest.raises(ValueError, match=r"expected 0.00 to 0.50 for 20 steps, got 0.6"):
        Budget(ADAPTER, STEPS, cur=0.6, pinned=pinned)


@pytest.mark.parametrize("objective", ["sdt", "l2c"])
@pytest.mark.parametrize(
    "target", [{"speedup": s} for s in (1.0, 1.1, 1.5, 1.7)] + [{"cur": c} for c in (0.0, 0.2, 0.5)]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_meets_the_target(objective: str, target: dict[str, float], seed: int) -> None:
    pinned = pinned_steps(STEPS, objective)
    router = Router(STEPS, 3, 2, seed, pinned)
    budget = Budget(ADAPTER, STEPS, **target, pinned=pinned)
    schedule = router.to_schedule(budget.tau(router), **FIELDS)
    assert schedule.compute[list(pinned)].all()
    assert budget.value(schedule.compute.reshape(STEPS, -1)) == pytest.approx(budget.target, rel=0.02, abs=1e-9)


# ---- costs of another kind


def test_macs_are_the_adapters() -> None:
    costs, counted = macs(ADAPTER), ADAPTER.macs(None, None, 1)
    assert costs.entries.tolist() == list(counted.branches) * 3 and costs.fixed == counted.fixed


@pytest.mark.parametrize("seed", range(3))
def test_costs_can_be_measured_ones(seed: int) -> None:
    costs = Costs(np.array([3.0, 1.0, 3.0, 1.0, 3.0, 1.0]), 8.0)
    compute = random_schedule(seed, STEPS).compute.reshape(STEPS, -1)
    computed = compute.reshape(-1, 3, 2).sum((0, 1))
    expected = STEPS * 20.0 / (STEPS * 8.0 + 3.0 * computed[0] + computed[1])
    assert Budget(ADAPTER, STEPS, speedup=1.5, costs=costs).value(compute) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"expected 1.00 to 2.33 for 20 steps, got 3"):
        Budget(ADAPTER, STEPS, speedup=3.0, costs=costs)


def test_description() -> None:
    schedule = hrt.Schedule.uniform(MODEL, STEPS)
    assert describe(schedule, None) == "CUR 50.0 %"
    assert describe(schedule, Budget(ADAPTER, STEPS, cur=0.4)) == "CUR 0.500 (target 0.4)"
    speedup = schedule.speedup(MODEL)
    assert describe(schedule, Budget(ADAPTER, STEPS, speedup=1.5)) == f"speed-up {speedup:.3f} (target 1.5)"


# ---- beta


@pytest.mark.parametrize("target", [{"speedup": 1.5}, {"cur": 0.4}], ids=str)
@pytest.mark.parametrize(("gate", "rises"), [(0.95, True), (0.05, False)])
def test_beta_rises_where_too_much_is_computed(target: dict[str, float], gate: float, rises: bool) -> None:
    beta = Beta(1e-3, Budget(ADAPTER, STEPS, **target))
    gates = np.full((STEPS, 6), gate)
    gates[0] = 1.0
    values = [beta.value]
    for _ in range(5):
        beta.steer(gates)
        values.append(beta.value)
    changes = np.diff(np.log(values))
    assert (changes > 0).all() if rises else (changes < 0).all()
    assert abs(changes).max() <= Beta.RATE + 1e-12


def test_beta_slows_down_as_gates_approach_the_target() -> None:
    budget = Budget(ADAPTER, STEPS, cur=0.4)
    steady, approaching = Beta(1.0, budget), Beta(1.0, budget)
    far, near = np.full((STEPS, 6), 0.63), np.full((STEPS, 6), 0.62)
    steady.steer(near)
    approaching.steer(far)
    before = approaching.value, steady.value
    steady.steer(near)
    approaching.steer(near)
    assert approaching.value / before[0] < steady.value / before[1]


def test_beta_without_a_budget_stays() -> None:
    beta = Beta(0.125, None)
    beta.steer(np.ones((STEPS, 6)))
    assert beta.value == 0.125


def test_beta_starts_where_cost_and_error_weigh_the_same() -> None:
    beta = Beta(None, Budget(ADAPTER, STEPS, cur=0.4))
    beta.start(error=0.3, entries=6)
    assert beta.value == pytest.approx(0.05)
    beta.start(error=9.0, entries=6)
    assert beta.value == pytest.approx(0.05)
