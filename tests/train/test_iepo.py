"""Lambda's estimators against whole runs, and its smoothing, bounds and gaps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harmonica_rt.train.iepo import Lambda, image_errors
from harmonica_rt.train.router import Router
from harmonica_rt.train.sdt import Gating, sdt
from harmonica_rt.train.task import Batch, Task

from .conftest import STEPS, explicit_run, make_router, make_task

TAU = 0.3
GATING = Gating(TAU)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def case() -> tuple[Task, Router, Batch]:
    task = make_task(double=True)
    return task, make_router(), task.draw(2, 11)


def end(case: tuple[Task, Router, Batch], computed: object) -> Tensor:
    task, router, batch = case
    return explicit_run(task, router, batch, TAU, computed, teachers=False).end


def brute_force(case: tuple[Task, Router, Batch], estimator: str) -> list[float]:
    if estimator == "telescoping":
        ends = [end(case, range(i + 1, STEPS)) for i in range(STEPS)]
        pairs = [(ends[i], ends[i - 1]) for i in range(1, STEPS)]
    else:
        pairs = [(end(case, ()), end(case, {i})) for i in range(1, STEPS)]
    return [(a - b).square().sum((1, 2, 3)).mean().item() for a, b in pairs]


@pytest.mark.parametrize("estimator", ["leave-one-out", "telescoping"])
def test_estimates_are_those_of_whole_runs(case: tuple[Task, Router, Batch], estimator: str) -> None:
    task, router, batch = case
    got = image_errors(task, router, GATING, batch, estimator)
    expected = brute_force(case, estimator)
    assert got.dtype == torch.float64 and got[0] == 0
    assert got[1:].tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0


def test_gain_is_leave_one_out_over_the_students_error(case: tuple[Task, Router, Batch]) -> None:
    task, router, batch = case
    errors = torch.tensor([step.mse.item() for step in sdt(task, router, GATING, batch)], dtype=torch.float64)
    got = image_errors(task, router, GATING, batch, "gain")
    expected = image_errors(task, router, GATING, batch, "leave-one-out")[1:] / errors
    torch.testing.assert_close(got[1:], expected, rtol=1e-4, atol=0)


def test_a_step_that_caches_nothing_has_no_gain() -> None:
    task, router = make_task(), make_router()
    with torch.no_grad():
        router.logits[2].fill_(50.0)  # r is 1 in fp32
    batch, gating = task.draw(2, 11), GATING
    gain, error = (image_errors(task, router, gating, batch, e) for e in ("gain", "leave-one-out"))
    assert gain.isnan().tolist() == [False, False, True, False, False, False]
    assert error[2] == 0 and (error[[1, 3, 4, 5]] > 0).all()


@pytest.mark.parametrize("estimator", ["leave-one-out", "telescoping", "gain"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_add_up(case: tuple[Task, Router, Batch], estimator: str, ranks: int) -> None:
    task, router, batch = case
    whole = image_errors(task, router, GATING, batch, estimator)
    shares = [image_errors(task, router, GATING, batch, estimator, rank, ranks) for rank in range(ranks)]
    torch.testing.assert_close(sum(shares), whole, rtol=1e-9, atol=0)
    assert all((share == 0).sum() >= STEPS // ranks for share in shares)


def test_an_unknown_estimator_is_refused(case: tuple[Task, Router, Batch]) -> None:
    task, router, batch = case
    with pytest.raises(ValueError, match=r"estimator: expected one of .*leave-one-out.*, got 'none'"):
        image_errors(task, router, GATING, batch, "none")


# ---- Lambda


def test_lambda_is_1_before_the_first_estimate() -> None:
    lambdas = Lambda(4)
    assert [lambdas[i] for i in range(4)] == [1.0] * 4 and lambdas.range == (1.0, 1.0)


def test_lambda_has_mean_1_over_the_steps_after_the_first() -> None:
    lambdas = Lambda(4, smoothing=0.0)
    lambdas.update(tensor(0, 1, 2, 6))
    assert lambdas.values.tolist() == pytest.approx([1, 1 / 3, 2 / 3, 2])
    assert lambdas.range == pytest.approx((1 / 3, 2))


def test_lambda_unnormalised_is_the_estimate() -> None:
    lambdas = Lambda(4, normalise=False)
    for estimate in ([0, 1e-9, 2, 6e7], [0, 3, 0, 1]):
        lambdas.update(tensor(*estimate))
        assert lambdas.values[1:].tolist() == estimate[1:]


@pytest.mark.parametrize("estimates", [[(0, 1e-9, 1, 1e9)], [(0, 1e-9, 1, 1e9), (0, 0, 1, 1)]], ids=len)
def test_lambdas_are_bounded(estimates: list[tuple[float, ...]]) -> None:
    lambdas = Lambda(4, bound=10.0)
    for estimate in estimates:
        lambdas.update(tensor(*estimate))
        low, high = lambdas.range
        assert high / low <= 100 * (1 + 1e-9)
        assert lambdas.values[1:].mean().item() == pytest.approx(1)


def test_smoothing_is_geometric() -> None:
    lambdas = Lambda(3, smoothing=0.75)
    lambdas.update(tensor(0, 0.5, 1.5))
    lambdas.update(tensor(0, 1.5, 0.5))
    low, high = 0.5**0.75 * 1.5**0.25, 1.5**0.75 * 0.5**0.25
    expected = [2 * low / (low + high), 2 * high / (low + high)]
    assert lambdas.values[1:].tolist() == pytest.approx(expected)


def test_nothing_cached_anywhere_gives_1() -> None:
    for estimate in (tensor(0, 0, 0), tensor(0, math.nan, math.nan)):
        lambdas = Lambda(3)
        lambdas.update(estimate)
        assert lambdas.values.tolist() == [1.0] * 3


def test_gaps_are_filled_log_linearly() -> None:
    lambdas = Lambda(7, normalise=False)
    nan = math.nan
    lambdas.update(tensor(0, nan, 1, nan, nan, 1000, nan))
    assert lambdas.values[1:].tolist() == pytest.approx([1, 1, 10, 100, 1000, 1000])
