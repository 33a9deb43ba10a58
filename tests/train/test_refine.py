"""Weights of output reuse, and noise levels of computed steps, by Gauss-Newton."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import harmonica_rt as hrt
from harmonica_rt.generating import Generation
from harmonica_rt.schedule import Schedule
from harmonica_rt.train.contexts import every
from harmonica_rt.train.refine import OutputNumbers, RefineProgress, _normal_equations, refine
from harmonica_rt.train.starts import HOLDS

from ..pipelines.folders import labelled_dit, text_flux
from .pipeline_cases import CALLS, SMALL

STEPS = 8
PROMPTS = ["a cat", "red fox"]
LEVELS = np.linspace(1.0, 1 / STEPS, STEPS)


def flux() -> Any:
    pipeline = text_flux()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    return pipeline


def computing(*steps: int, order: int = 2) -> Schedule:
    output = np.ones(STEPS, bool)
    output[list(steps)] = False
    model = text_flux().transformer
    return Schedule(output=output, model=type(model).__name__, level="output", order=order)


def learned(pipeline: Any, schedules: Any, **more: Any) -> Any:
    _, call = CALLS["flux"]
    given = {"iterations": 3, "batch": 2, "validation": 2, "size": 2, "num_inference_steps": STEPS}
    return refine(pipeline, schedules, PROMPTS, **{**given, **call, **more})


def snr(pipeline: Any, wanted: torch.Tensor, schedules: Any = None) -> float:
    """Of the images that a person gets, dB."""
    call = CALLS["flux"][1] | {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    if schedules is not None:
        hrt.compile(pipeline, schedules)
        if (timesteps := every(schedules)[0].timesteps) is not None:
            call["sigmas"] = [t / 1000 for t in timesteps]
    images = Generation(pipeline, PROMPTS, seed=5).generation([0, 1], **call)[0]
    if schedules is not None:
        hrt.uncompile(pipeline)
    return images if wanted is None else 10 * torch.log10(wanted.var() / (images - wanted).square().mean()).item()


@pytest.mark.parametrize("times", [False, True], ids=["weights", "times"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own contexts"])
def test_a_persons_images_come_closer(own: bool, times: bool) -> None:
    pipeline, told = flux(), []
    wanted = snr(pipeline, None)
    start = computing(0, 3, 5)
    before = snr(pipeline, wanted, start)
    start = {"cond": start, "uncond": computing(0, 4)} if own else start
    schedules = learned(pipeline, start, times=times, on_progress=told.append)
    assert [type(each) for each in told] == [RefineProgress] * len(told)
    assert told[-1].error < told[0].error or len(told) == 1
    assert snr(pipeline, wanted, schedules) > before + 3
    first = every(schedules)[0]
    if times:
        assert not np.allclose(first.timesteps, 1000 * LEVELS) and (np.diff(first.timesteps) < 0).all()
    assert all(schedule.timesteps == first.timesteps for schedule in every(schedules))
    for schedule in every(schedules):
        assert "by Gauss-Newton" in schedule.note and schedule.note.count(HOLDS) == 1
        assert schedule.sampler == "FlowMatchEulerDiscreteScheduler"
        assert schedule.guidance_scale == CALLS["flux"][1].get("true_cfg_scale", CALLS["flux"][1].get("guidance_scale"))
        assert times or np.allclose(schedule.timesteps, 1000 * LEVELS)
    again = learned(pipeline, schedules, iterations=1, times=times)
    assert all(schedule.note.count(HOLDS) == 1 for schedule in every(again))


class Straight:
    """Results that are straight in two numbers: J^T J and J^T e are known."""

    size, wanted, first = 2, torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.5, 0.0], [0.0, 1.0]])
    by = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.5, 0.5], [1.0, 0.0]]])  # [numbers, images, latents]

    def results(
        self, numbers: Any, change: np.ndarray, starts: Any, parts: list[tuple[int, int]]
    ) -> list[torch.Tensor]:
        own = self.first + torch.einsum("p,pid->id", torch.as_tensor(change, dtype=torch.float32), self.by)
        return [own[first:end] for first, end in parts]

    def end(self, first: int, end: int) -> torch.Tensor:
        return self.wanted[first:end]

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_steps_follow_the_gradient_of_errors_to_the_power(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Straight()
    monkeypatch.setattr("harmonica_rt.train.refine._results", own.results)
    _, gradient = _normal_equations(own, np.zeros(2), own, 0, 2, power)
    change = torch.zeros(2, requires_grad=True)
    errors = (own.first + torch.einsum("p,pid->id", change, own.by) - own.wanted).square().sum(1)
    (errors.log() if power == 0 else errors**power / power).sum().backward()
    expected = change.grad.numpy()
    assert gradient / np.linalg.norm(gradient) == pytest.approx(expected / np.linalg.norm(expected), abs=1e-3)


def test_the_converged_solution_may_be_aimed_at() -> None:
    pipeline, start = flux(), computing(0, 3, 5)
    call = CALLS["flux"][1] | {"num_inference_steps": 100, "output_type": "latent", "return_dict": False}
    wanted = Generation(pipeline, PROMPTS, seed=5).generation([0, 1], **call)[0]
    assert snr(pipeline, wanted, learned(pipeline, start, target="converged")) > snr(pipeline, wanted, start) + 3


def test_no_change_is_the_run_as_it_was() -> None:
    own = computing(0, 3, 5)
    found, levels = OutputNumbers(own, LEVELS)(np.zeros(OutputNumbers(own, LEVELS).size))
    assert found == own and np.allclose(levels, LEVELS)
    kept = own.replace(timesteps=tuple(1000 * LEVELS))
    weights = OutputNumbers(kept, None)
    assert weights.size == OutputNumbers(own, LEVELS).size - 2 and weights(np.zeros(weights.size)) == (kept, None)


def test_numbers_are_levels_of_computed_steps_and_weights_between_them() -> None:
    own = {"cond": computing(0, 3, 4), "uncond": computing(0, 5)}
    times = OutputNumbers(own, LEVELS)
    assert times.nodes.tolist() == [0, 3, 4, 5]
    # cond: 1 value after step 0, none between 3 and 4, 3 after 4; uncond: 1 after step 0, 2 after 5
    assert times.size == 3 + (1 + 3) + (1 + 2)
    change = np.zeros(times.size)
    change[0], change[3], change[4:7] = 0.05, 0.5, (0.1, 0.2, 0.3)
    found, levels = times(change)
    assert levels[0] == 1.0 and levels[3] == pytest.approx(LEVELS[3] + 0.05)
    assert np.allclose(levels[1:3], 1.0 - (1.0 - levels[3]) / 3 * np.array([1, 2]))
    assert np.allclose(levels[4:], LEVELS[4:])
    added = found["cond"].output_weights - own["cond"].output_weights
    assert np.allclose(added[1:3], [0.5, 0, 0]) and np.allclose(added[5:], [0.1, 0.2, 0.3])
    assert not added[[0, 3, 4]].any()
    assert np.array_equal(found["uncond"].output_weights, own["uncond"].output_weights)


def test_levels_that_no_longer_fall_are_told() -> None:
    times = OutputNumbers(computing(0, 3, 5), LEVELS)
    assert times.falls(np.zeros(times.size))
    for at, by in ((0, 0.4), (0, -0.3), (1, -0.4)):
        change = np.zeros(times.size)
        change[at] = by
        assert not times.falls(change)


def uneven(pipeline: Any) -> Any:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipeline


def compiled(pipeline: Any) -> Any:
    return hrt.compile(pipeline, computing(0, 3))


@pytest.mark.parametrize(
    ("make", "schedule", "call", "message"),
    [
        (labelled_dit, computing(0, 3), {}, "expected a pipeline whose call takes sigmas, got DiTPipeline"),
        (flux, computing(0, 3), {"sigmas": [1.0, 0.5]}, r"expected a call without sigmas, got \[1.0, 0.5\]"),
        (flux, computing(*range(STEPS)), {}, "expected a schedule that reuses the output and nothing else, got"),
        (
            lambda: uneven(flux()),
            computing(0, 3),
            {},
            "expected a scheduler that does not shift sigmas, got {.*'shift': 3.0",
        ),
        (flux, computing(0, 3), {"num_inference_steps": 5}, "expected a schedule of 5 steps, got 8"),
        (
            lambda: flux().to(torch.bfloat16),
            computing(0, 3),
            {},
            "expected a transformer in float32, got torch.bfloat16",
        ),
        (
            lambda: compiled(flux()),
            computing(0, 3),
            {},
            "expected one that is not compiled, got a compiled transformer",
        ),
        (flux, computing(0, 3), {"target": "best"}, r"target: expected one of \('full', 'converged'\), got 'best'"),
        (flux, computing(0, 3), {"power": -1.0}, "power: expected a number of at least 0, got -1"),
    ],
    ids=["no sigmas", "sigmas", "no reuse", "shifted", "steps", "half", "compiled", "target", "power"],
)
def test_what_cannot_be_learned_is_refused_by_name(make: Any, schedule: Any, call: Any, message: str) -> None:
    pipeline = make()
    given = (
        {"num_inference_steps": STEPS, **SMALL, **call}
        if "prompt" in inspect.signature(type(pipeline).__call__).parameters
        else {}
    )
    prompts = PROMPTS if given else [0, 1]
    with pytest.raises(ValueError, match=message):
        refine(pipeline, schedule, prompts, times=True, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(({name: 0}, f"{name}: expected a positive integer, got 0") for name in ("batch", "size", "validation")),
        ({"iterations": 2.5}, "iterations: expected a positive integer, got 2.5"),
        ({"minutes": float("nan")}, "minutes: expected a number above 0, got nan"),
    ],
    ids=lambda each: str(each)[:24],
)
def test_bad_numbers_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learned(flux(), computing(0, 3), **given)


@pytest.mark.parametrize("schedules", ["mine.json", {}, {"cond": None}], ids=str)
def test_no_schedules_are_refused_by_name(schedules: Any) -> None:
    with pytest.raises(TypeError, match="schedules: expected a Schedule, or one by context, got"):
        learned(flux(), schedules)
