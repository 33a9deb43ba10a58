"""The forecast: polynomials through the values there are, over steps, timesteps or log-SNRs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import assume, given
from hypothesis import strategies as st

from harmonica_rt import Schedule
from harmonica_rt.forecast import basis, forecast, history, log_snr

from .conftest import make_dit

SEEDS, ORDERS, STEPS = st.integers(0, 2**32 - 1), st.integers(0, 2), st.integers(1, 9)


def random_compute(seed: int, steps: int) -> np.ndarray:
    """What is computed, at random; step 0 computes everything."""
    rng = np.random.default_rng(seed)
    compute = rng.random((steps, 2, 2)) < rng.uniform(0.1, 0.9)
    compute[0] = True
    return compute


# ---- the polynomial through values


@given(SEEDS, st.integers(1, 3), st.integers(1, 3))
def test_basis_is_exact_for_polynomials(seed: int, values: int, exist: int) -> None:
    assume(exist <= values)
    rng = np.random.default_rng(seed)
    nodes = np.full(values, -1)
    nodes[:exist] = rng.choice(20, exist, replace=False)
    at, coefficients = int(rng.integers(0, 30)), rng.normal(size=exist)
    weights = basis(np.array(at), nodes)
    assert not weights[exist:].any()
    expected = np.polyval(coefficients, at)
    assert weights[:exist] @ np.polyval(coefficients, nodes[:exist]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_basis_at_a_node_is_that_node_alone() -> None:
    nodes = np.tile([7, 4, 2], (3, 1))
    assert basis(nodes[0], nodes).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


# ---- over what it extrapolates


def uneven(steps: int = 6) -> tuple[DPMSolverMultistepScheduler, Schedule]:
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    known = {"timesteps": scheduler.timesteps, "log_snr": log_snr(scheduler)}
    return scheduler, Schedule.uniform(make_dit(), steps, every=3, **known)


@given(SEEDS, ORDERS, STEPS)
def test_a_forecast_is_exact_for_polynomials_of_its_positions(seed: int, order: int, steps: int) -> None:
    compute = random_compute(seed, steps)
    rng = np.random.default_rng(seed)
    positions, coefficients = np.cumsum(rng.uniform(0.5, 2, steps)), rng.normal(size=order + 1)
    nodes = history(compute, order)
    weights, enough = forecast(compute, order, positions), (nodes >= 0).all(-1) & ~compute
    values = np.polyval(coefficients, positions)
    got = (weights * np.where(nodes >= 0, values[nodes], 0)).sum(-1)
    wanted = np.broadcast_to(values[:, None, None], got.shape)
    np.testing.assert_allclose(got[enough], wanted[enough], rtol=1e-6, atol=1e-6)
    assert np.array_equal(forecast(compute, order, np.arange(steps) * 1.0), forecast(compute, order))


def test_a_schedule_says_over_what_its_forecast_goes(tmp_path: Path) -> None:
    scheduler, schedule = uneven()
    t, snr = scheduler.timesteps.double().numpy(), np.array(schedule.log_snr)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    np.testing.assert_allclose(snr, np.log(alphas / (1 - alphas)), rtol=1e-5)
    for name, where in (("index", np.arange(6.0)), ("timestep", t), ("logsnr", snr)):
        other = schedule.replace(forecast=name)
        assert not other.learned and not other.replace(note="x").learned
        slope = (where[4] - where[3]) / (where[3] - where[0])
        np.testing.assert_allclose(other.weights[4, 0, 0], [1 + slope, -slope], rtol=1e-9)
        other.save(tmp_path / "s.json")
        assert Schedule.load(tmp_path / "s.json") == other
        late = other.starting_at(2)
        assert (late.forecast, late.log_snr) == (name, other.log_snr[2:])
        moved = other.replace(compute=np.roll(other.compute, 1, axis=0) | other.compute)
        assert moved.forecast == name and not moved.learned
    assert len({schedule.replace(forecast=name) for name in ("index", "timestep", "logsnr")}) == 3


def test_forecasts_that_cannot_be_are_named() -> None:
    _, schedule = uneven()
    with pytest.raises(ValueError, match=r"forecast: expected one of \('index', 'timestep', 'logsnr'\), got 'time'"):
        schedule.replace(forecast="time")
    with pytest.raises(ValueError, match="forecast 'logsnr': expected log_snr, got none"):
        schedule.replace(forecast="logsnr", log_snr=None)
    with pytest.raises(ValueError, match="forecast 'timestep': expected distinct timesteps, got 3 twice"):
        schedule.replace(forecast="timestep", timesteps=[9, 7, 5, 3, 3, 1])
    with pytest.raises(ValueError, match=r"log_snr: expected 6 \(one a step\), got 2"):
        schedule.replace(log_snr=[1, 2])
    with pytest.raises(ValueError, match="expected a scheduler with alphas_cumprod, got FlowMatchEulerDiscrete"):
        log_snr(FlowMatchEulerDiscreteScheduler())
