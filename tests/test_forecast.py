"""Weights carried over to other computed steps: unchanged where nothing moves, a forecast stays a forecast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import assume, given
from hypothesis import strategies as st

from harmonica_rt import Schedule
from harmonica_rt.forecast import basis, carried, forecast, history, log_snr

from .conftest import make_dit, random_schedule

SEEDS, ORDERS, STEPS = st.integers(0, 2**32 - 1), st.integers(0, 2), st.integers(1, 9)


def plans(seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Two random sets of what is computed; step 0 computes everything."""
    rng = np.random.default_rng(seed)
    was, now = rng.random((2, steps, 2, 2)) < rng.uniform(0.1, 0.9)
    was[0] = now[0] = True
    return was, now


def random_weights(compute: np.ndarray, order: int, seed: int) -> np.ndarray:
    exists = (history(compute, order) >= 0) & ~compute[..., None]
    return np.where(exists, np.random.default_rng(seed).normal(size=exists.shape), 0.0)


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


# ---- carried


@given(SEEDS, ORDERS, STEPS)
def test_the_same_plan_keeps_its_weights_to_the_bit(seed: int, order: int, steps: int) -> None:
    compute, _ = plans(seed, steps)
    weights = random_weights(compute, order, seed)
    assert carried(weights, compute, compute).tobytes() == weights.tobytes()


@given(SEEDS, ORDERS, STEPS)
def test_entries_with_the_same_values_keep_their_weights(seed: int, order: int, steps: int) -> None:
    was, now = plans(seed, steps)
    now = np.where(np.arange(steps)[:, None, None] < steps // 2, was, now)
    weights = random_weights(was, order, seed)
    same = (history(was, order) == history(now, order)).all(-1) & ~was & ~now
    np.testing.assert_array_equal(carried(weights, was, now)[same], weights[same])


@given(SEEDS, ORDERS, STEPS)
def test_a_forecast_becomes_the_new_forecast(seed: int, order: int, steps: int) -> None:
    was, now = plans(seed, steps)
    np.testing.assert_allclose(carried(forecast(was, order), was, now), forecast(now, order), rtol=1e-9, atol=1e-9)


@given(SEEDS, ORDERS, STEPS)
def test_nothing_stands_where_nothing_may(seed: int, order: int, steps: int) -> None:
    was, now = plans(seed, steps)
    got = carried(random_weights(was, order, seed), was, now)
    free = (history(now, order) >= 0) & ~now[..., None]
    assert got.shape == free.shape and np.isfinite(got).all()
    zeros = got[~free]
    assert not zeros.any() and not np.signbit(zeros).any()


@given(SEEDS, ORDERS, STEPS)
def test_what_weights_say_of_a_polynomial_stays(seed: int, order: int, steps: int) -> None:
    """Of values on a polynomial that the new ones determine, the sum is the same before and after."""
    was, now = plans(seed, steps)
    weights = random_weights(was, order, seed)
    line = np.random.default_rng(seed).normal(size=order + 1) @ np.arange(steps) ** np.arange(order + 1)[:, None]
    enough = (history(now, order) >= 0).all(-1) & (history(was, order) >= 0).all(-1) & ~was & ~now
    sums = [
        (w * np.where(h >= 0, line[h], 0.0)).sum(-1)
        for w, h in ((weights, history(was, order)), (carried(weights, was, now), history(now, order)))
    ]
    np.testing.assert_allclose(sums[1][enough], sums[0][enough], rtol=1e-6, atol=1e-6)


def test_by_hand() -> None:
    was, now = (np.isin(np.arange(6), steps).reshape(6, 1, 1) for steps in ([0, 2, 3], [0, 1, 3]))
    weights = forecast(was, 1)
    weights[5, 0, 0] = [2.0, -0.5]
    got = carried(weights, was, now)[:, 0, 0]
    # c(2) is (c(3) + c(1)) / 2 now, so 2 c(3) - c(2) / 2 is 1.75 c(3) - 0.25 c(1); step 4's forecast, and step 2's
    np.testing.assert_allclose(got, [[0, 0], [0, 0], [2, -1], [0, 0], [1.5, -0.5], [1.75, -0.25]])


# ---- Schedule.with_compute


def with_outputs(order: int = 1) -> Schedule:
    schedule = random_schedule(0, 6, order=order)
    output = np.isin(np.arange(6), [2, 4])
    schedule = schedule.replace(compute=schedule.compute & ~output[:, None, None], output=output)
    weights, outputs = 1.5 * schedule.weights, 0.5 * schedule.output_weights
    return schedule.replace(weights=weights, output_weights=outputs, timesteps=range(6, 0, -1), note="kept")


@pytest.mark.parametrize("order", [0, 1, 2])
def test_with_compute_keeps_everything_else(order: int) -> None:
    schedule = with_outputs(order)
    assert schedule.with_compute(schedule.compute) == schedule
    compute = schedule.compute.copy()
    compute[[3, 5]] = compute[[5, 3]]
    other = schedule.with_compute(compute)
    assert np.array_equal(other.compute, compute)
    assert not np.array_equal(other.weights, schedule.weights) and not other.weights[[2, 4]].any()
    for name in ("output", "output_weights"):
        assert np.array_equal(getattr(other, name), getattr(schedule, name)), name
    for name in ("order", "model", "branches", "timesteps", "note"):
        assert getattr(other, name) == getattr(schedule, name), name


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_with_outputs_stays_one(order: int) -> None:
    schedule = with_outputs(order)
    schedule = schedule.replace(weights=None, output_weights=None)
    compute = schedule.compute.copy()
    compute[[3, 5]] = compute[[5, 3]]
    other = schedule.with_compute(compute)
    np.testing.assert_allclose(other.weights, schedule.replace(compute=compute, output=schedule.output).weights)


@pytest.mark.parametrize(
    ("compute", "match"),
    [
        (np.ones((5, 3, 2), bool), r"compute: expected shape \[6, 3, 2\], got \[5, 3, 2\]"),
        (np.ones((6, 4, 2), bool), r"compute: expected shape \[6, 3, 2\], got \[6, 4, 2\]"),
        (np.ones((6, 3, 3), bool), r"2.*3"),
        (np.ones((6, 3), bool), r"compute: expected .*, got .*\(6, 3\)|compute: expected .*, got .*\[6, 3\]"),
        (np.zeros((6, 3, 2), bool), "step 0"),
        (np.ones((6, 3, 2), bool), "output: .*step 2"),
    ],
    ids=str,
)
def test_with_compute_refuses(compute: np.ndarray, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        with_outputs().with_compute(compute)


# ---- over what it extrapolates


def uneven(steps: int = 6) -> tuple[DPMSolverMultistepScheduler, Schedule]:
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    known = {"timesteps": scheduler.timesteps, "log_snr": log_snr(scheduler)}
    return scheduler, Schedule.uniform(make_dit(), steps, every=3, **known)


@given(SEEDS, ORDERS, STEPS)
def test_a_forecast_is_exact_for_polynomials_of_its_positions(seed: int, order: int, steps: int) -> None:
    compute, _ = plans(seed, steps)
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
        moved = other.with_compute(np.roll(other.compute, 1, axis=0) | other.compute)
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
