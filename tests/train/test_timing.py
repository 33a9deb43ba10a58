"""Seconds of a step, measured: shapes, signs, what they make of a budget."""

from __future__ import annotations

import numpy as np

from harmonica_rt.train.budget import Budget
from harmonica_rt.train.timing import seconds

from .conftest import ENTRIES, make_task


def test_seconds_of_a_step() -> None:
    task = make_task()
    costs = seconds(task, batch=2, backend="eager", rounds=5)
    assert costs.entries.shape == (ENTRIES,) and (costs.entries >= 0).all() and costs.entries.any()
    assert costs.fixed > 0
    assert np.array_equal(costs.entries[:2], costs.entries[2:4]), "layers cost the same"


def test_a_budget_of_time() -> None:
    task = make_task(steps=10)
    costs = seconds(task, batch=1, backend="eager", rounds=3)
    high = 10 * (costs.fixed + costs.entries.sum()) / (10 * costs.fixed + costs.entries.sum())
    budget = Budget(task.adapter, 10, speedup=1 + (high - 1) / 2, costs=costs)
    compute = budget.spread().reshape(10, -1)
    assert budget.value(compute) >= budget.target - 1e-6
    assert 1 < compute.any(1).sum() < 10
