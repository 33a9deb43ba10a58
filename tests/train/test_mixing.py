"""Mixing: hard gates against the runtime, soft ones against the formula, what is evaluated and what is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from harmonica_rt.train.mixing import Mixing
from harmonica_rt.train.sdt import Gating, run_router

from ..conftest import make_dit, random_schedule, relative_error
from .conftest import ENTRIES, make_router, make_task, sample


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("seed", "guidance"), [(0, 1.5), (1, 1.5), (2, 1.0)])
def test_hard_gates_are_the_runtime(order: int, seed: int, guidance: float, evaluations: list[int]) -> None:
    task = make_task(steps=8, guidance=guidance)
    schedule = random_schedule(seed, steps=8, order=order)
    router = make_router(steps=8)
    router.start_from(schedule.compute, 200.0)  # r is 0 or 1 in fp32
    batch = task.draw(2, seed)
    expected = sample(hrt.compile(make_dit(), schedule, backend="eager"), task, batch)
    seen: list[Mixing] = []
    got = run_router(task, router, Gating(order=order), batch, lambda run, mixing: seen.append(mixing))
    assert relative_error(got, expected) <= 1e-5
    assert relative_error(sample(task.model, task, batch), expected) > 1e-3  # reuse matters here
    assert seen[-1].evaluated == len(evaluations) == schedule.compute.sum()


def test_soft_gates_mix_fresh_and_cached() -> None:
    mixing = Mixing(2, 0, 3)
    first, fresh = torch.randn(2, 4), torch.randn(2, 4)
    for entry in range(2):
        assert mixing.compute(0)(entry, lambda: first) is first
    gates = torch.tensor([0.25, 0.75], requires_grad=True)
    step = mixing.mix(1, gates, np.array([True, False]))
    mixed = [step(entry, lambda: fresh) for entry in range(2)]
    for value, r in zip(mixed, gates.tolist()):
        torch.testing.assert_close(value, r * fresh + (1 - r) * first)
    assert mixing.evaluated == 4
    assert torch.equal(mixing.values[0][0], mixed[0]) and torch.equal(mixing.values[1][0], first)
    assert not any(v.requires_grad for values in mixing.values for v in values)
    assert mixing.kept[..., 0].tolist() == [[True, True], [True, False], [False, False]]
    (gradient,) = torch.autograd.grad(mixed[0].sum(), gates)
    torch.testing.assert_close(gradient, torch.stack([(fresh - first).sum(), torch.zeros(())]))


def test_gates_that_learn_are_evaluated_even_at_0_and_1() -> None:
    mixing = Mixing(2, 0, 2)
    stand_in = mixing.compute(0)
    for entry in range(2):
        stand_in(entry, lambda: torch.zeros(1))
    gates = torch.tensor([0.0, 1.0], requires_grad=True)
    stand_in = mixing.mix(1, gates, np.ones(2, bool))
    total = sum(stand_in(entry, lambda: torch.ones(1)) for entry in range(2))
    assert mixing.evaluated == 4
    assert torch.autograd.grad(total, gates)[0].tolist() == [1.0, 1.0]


def test_a_fork_leaves_the_original_alone() -> None:
    mixing = Mixing(ENTRIES, 1, 3)
    for entry in range(ENTRIES):
        mixing.compute(0)(entry, lambda: torch.zeros(1))
    other = mixing.fork()
    stand_in = other.compute(1)
    for entry in range(ENTRIES):
        stand_in(entry, lambda: torch.ones(1))
    assert [len(v) for v in mixing.values] == [1] * ENTRIES and [len(v) for v in other.values] == [2] * ENTRIES
    assert not mixing.kept[1].any() and other.kept[1].all()
