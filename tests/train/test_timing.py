"""Seconds of a step, measured: shapes, signs, what they make of a budget."""

from __future__ import annotations

import numpy as np
import torch

from harmonica_rt.train.budget import Budget
from harmonica_rt.train.starts import full_run
from harmonica_rt.train.timing import seconds

from .conftest import ENTRIES, make_task

WIDE = {"heads": 4, "head_dim": 32}  # where 16 images' branches take far longer than what else varies


def test_seconds_of_a_step() -> None:
    costs = seconds(make_task(**WIDE), batch=16, backend="eager", rounds=5)
    assert costs.entries.shape == (ENTRIES,) and (costs.entries > 0).all()
    assert 0 < costs.fixed < 10
    assert np.array_equal(costs.entries[:2], costs.entries[2:4]), "layers cost the same"


def test_a_budget_of_time() -> None:
    task = make_task(steps=10, **WIDE)
    costs = seconds(task, batch=16, backend="eager", rounds=3)
    high = 10 * (costs.fixed + costs.entries.sum()) / (10 * costs.fixed + costs.entries.sum())
    budget = Budget(task.adapter, 10, speedup=1 + (high - 1) / 2, costs=costs)
    compute = budget.spread().reshape(10, -1)
    assert budget.value(compute) >= budget.target - 1e-6
    assert 1 < compute.any(1).sum() < 10


def test_one_round_is_enough_and_leaves_the_model_as_it_was() -> None:
    task = make_task(guidance=1.0)
    batch, state = task.draw(2, 5), {name: p.clone() for name, p in task.model.state_dict().items()}
    before = full_run(task, batch)
    costs = seconds(task, batch=2, backend="eager", rounds=1)
    assert costs.fixed > 0 and (costs.entries >= 0).all()
    assert torch.equal(full_run(task, batch), before)
    after = task.model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], p) for name, p in state.items())
