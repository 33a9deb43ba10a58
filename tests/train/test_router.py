"""Routers: initial logits, thresholds, warm starts, the published format."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from harmonica_rt import Schedule
from harmonica_rt.train.router import LIMIT, Router, write_published

from ..conftest import make_dit, random_schedule
from .conftest import ENTRIES, LAYERS, STEPS, make_router

FIELDS = {"model": "DiTTransformer2DModel", "branches": ("attn", "mlp"), "order": 0}


def test_logits_start_normal_clamped_and_pinned() -> None:
    logits = Router(50, 28, 2, seed=1).to_tensor()
    assert logits.shape == (50, 28, 2)
    assert (logits[0] == LIMIT).all() and logits.abs().max() <= LIMIT
    learning = logits[1:]
    assert abs(learning.mean()) < 0.06 and abs(learning.std() - 1) < 0.06
    assert torch.equal(Router(50, 28, 2, seed=1).to_tensor(), logits)
    assert not torch.equal(Router(50, 28, 2, seed=2).to_tensor(), logits)


def test_pinned_steps_do_not_learn() -> None:
    router = Router(STEPS, LAYERS, 2, pinned=(0, 2, 4))
    assert [row.requires_grad for row in router.logits] == [False, True, False, True, False, True]
    assert (router.to_tensor()[[0, 2, 4]] == LIMIT).all()


def test_clamp() -> None:
    router = make_router(torch.linspace(-20, 20, STEPS * ENTRIES))
    before = router.to_tensor()
    router.clamp_()
    assert torch.equal(router.to_tensor(), before.clamp(-5, 5)) and before.abs().max() > 5


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5, 0.9])
def test_computed_iff_r_is_above_tau(tau: float) -> None:
    router = make_router()
    schedule = router.to_schedule(tau, sampler="DDIMScheduler", **FIELDS)
    expected = 1 / (1 + np.exp(-router.to_tensor().double().numpy())) > tau
    assert np.array_equal(schedule.compute[1:], expected[1:]) and schedule.compute[0].all()
    assert expected.any() and not expected.all()
    assert schedule.sampler == "DDIMScheduler"
    assert [router.kept(i, tau).tolist() for i in range(1, STEPS)] == expected[1:].reshape(-1, ENTRIES).tolist()


@pytest.mark.parametrize("tau", [0.1, 0.997])
def test_pinned_steps_compute_at_any_tau(tau: float) -> None:
    """0.997 is above the r of a pinned step's logit."""
    schedule = Router(STEPS, LAYERS, 2, pinned=(0, 2, 4)).to_schedule(tau, **FIELDS)
    assert schedule.compute[[0, 2, 4]].all()


@pytest.mark.parametrize("tau", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), "0.1", None])
def test_tau_must_lie_between_0_and_1(tau: object) -> None:
    with pytest.raises(ValueError, match=rf"tau: expected a number between 0 and 1, got {re.escape(repr(tau))}"):
        make_router().to_schedule(tau, **FIELDS)


def test_warm_start_is_the_schedule_at_one_half() -> None:
    schedule = random_schedule(4, STEPS)
    router = Router(STEPS, LAYERS, 2)
    router.start_from(schedule.compute, 1.5)
    assert np.array_equal(router.to_schedule(0.5, **FIELDS).compute, schedule.compute)
    assert (router.to_tensor()[1:].abs() == 1.5).all()
    assert (router.to_tensor()[0] == LIMIT).all()


def test_load_takes_back_what_to_tensor_gave() -> None:
    router, other = make_router(seed=1), make_router(seed=2)
    other.load(router.to_tensor())
    assert torch.equal(other.to_tensor(), router.to_tensor())
    with pytest.raises(ValueError, match=r"expected logits of shape \(6, 3, 2\), got \(5, 3, 2\)"):
        other.load(router.to_tensor()[1:])


@pytest.mark.parametrize("tau", [0.02, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_published_is_read_back(tmp_path: Path, tau: float, seed: int) -> None:
    router, model = make_router(seed=seed, spread=4.0), make_dit()
    write_published(router, tmp_path / "router.pt", tau)
    expected = router.to_schedule(tau, **FIELDS)
    assert Schedule.from_router(tmp_path / "router.pt", model, note="").compute.tolist() == expected.compute.tolist()
    assert 0 < expected.cur < 1
    assert list(torch.load(tmp_path / "router.pt")) == ["routers"]


@pytest.mark.parametrize("tau", [0.1, 0.997])
def test_pinned_steps_are_published_as_computed(tmp_path: Path, tau: float) -> None:
    router = Router(STEPS, LAYERS, 2, pinned=(0, 2, 4))
    write_published(router, tmp_path / "router.pt", tau)
    assert Schedule.from_router(tmp_path / "router.pt", make_dit()).compute[[0, 2, 4]].all()
