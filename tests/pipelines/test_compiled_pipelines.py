"""Real pipelines, compiled at levels blocks and output, against themselves and against reuse by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler
from torch import Tensor, nn

import harmonica_rt as hrt

from ..conftest import relative_error
from .by_hand import BlockCalls, ByHand, halves, trunk, whole
from .made import MADE
from .parts import STEPS, Made

WITH_BLOCKS = [name for name in MADE if MADE[name].streams]
LEVELS = [(name, level) for name in MADE for level in ("blocks", "output") if level == "output" or name in WITH_BLOCKS]
TOLERANCE = 1e-5


def models_of(pipe: DiffusionPipeline, made: Made) -> list[nn.Module]:
    return [getattr(pipe, denoiser) for denoiser in made.denoisers]


def uniform(pipe: DiffusionPipeline, made: Made, every: int = 2, **fields: Any) -> hrt.Schedule:
    return hrt.Schedule.uniform(getattr(pipe, made.denoisers[0]), made.steps, every, **fields)


def check_against(pipe: DiffusionPipeline, made: Made, oracle: ByHand, models: list[nn.Module], plain: Tensor) -> None:
    """Three runs of the compiled `pipe` are what `oracle` gives, and compute no more than it says."""
    wanted = oracle.run()
    assert relative_error(wanted, plain) > 10 * TOLERANCE, "reuse changes the latents, or this test shows nothing"
    assert 0 < len(oracle.computed) < len(made.calls)
    counts = BlockCalls(oracle.pipe, made, models_of(oracle.pipe, made))
    oracle.run()
    full = counts.take()
    assert min(full) > 0
    assert relative_error(made.call(pipe), wanted) < TOLERANCE
    counts = BlockCalls(pipe, made, models)
    latents = made.call(pipe)
    assert counts.take() == [n if call in oracle.computed else 0 for call, n in enumerate(full)]
    assert relative_error(latents, wanted) < TOLERANCE
    assert torch.equal(made.call(pipe), latents)


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_the_full_schedule_gives_the_same_latents(name: str, level: str) -> None:
    made = MADE[name]
    pipe = made.make()
    plain, models = made.call(pipe), models_of(pipe, made)
    schedule = hrt.Schedule.full(models[0], STEPS, level=level)
    assert hrt.compile(pipe, schedule, backend="eager") is pipe
    assert all(a is not b for a, b in zip(models_of(pipe, made), models))
    for _ in range(2):
        assert torch.equal(made.call(pipe), plain)
    hrt.uncompile(pipe)
    assert all(a is b for a, b in zip(models_of(pipe, made), models))
    assert torch.equal(made.call(pipe), plain)


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_reuse_is_as_by_hand(name: str, level: str) -> None:
    made = MADE[name]
    pipe = made.make()
    plain, models = made.call(pipe), models_of(pipe, made)
    hrt.compile(pipe, uniform(pipe, made, level=level), backend="eager")
    oracle = ByHand(made.make(), made, whole if level == "output" else trunk)
    check_against(pipe, made, oracle, models, plain)
    hrt.uncompile(pipe)
    assert torch.equal(made.call(pipe), plain)


@pytest.mark.parametrize("name", [name for name in WITH_BLOCKS if not MADE[name].skips])
def test_groups_with_a_carry_are_as_by_hand(name: str) -> None:
    made = MADE[name]
    pipe = made.make()
    plain, models = made.call(pipe), models_of(pipe, made)
    hrt.compile(pipe, uniform(pipe, made, level="blocks", groups=2, carry=1.0), backend="eager")
    check_against(pipe, made, ByHand(made.make(), made, halves, carry=1.0), models, plain)


@pytest.mark.parametrize("level", ["blocks", "output"])
@pytest.mark.parametrize("name", ["flux, true CFG", "wan 2.2"])
def test_a_schedule_each_for_the_contexts(name: str, level: str) -> None:
    made = MADE[name]
    pipe = made.make()
    plain, models = made.call(pipe), models_of(pipe, made)
    every = {"cond": 2, "uncond": 3}
    schedules = {context: uniform(pipe, made, n, level=level) for context, n in every.items()}
    hrt.compile(pipe, schedules, backend="eager")
    groups = whole if level == "output" else trunk
    oracle = ByHand(made.make(), made, groups, every=lambda call: every[call.context])
    check_against(pipe, made, oracle, models, plain)


@pytest.mark.parametrize("level", ["blocks", "output"])
def test_a_schedule_each_for_the_denoisers(level: str) -> None:
    made = MADE["wan 2.2"]
    pipe = made.make()
    plain, models = made.call(pipe), models_of(pipe, made)
    every = {"transformer": 2, "transformer_2": 3}
    schedules = {name: uniform(pipe, made, n, level=level) for name, n in every.items()}
    hrt.compile(pipe, schedules, backend="eager")
    groups = whole if level == "output" else trunk
    oracle = ByHand(made.make(), made, groups, every=lambda call: every[call.denoiser])
    check_against(pipe, made, oracle, models, plain)


@pytest.mark.parametrize("level", ["blocks", "output"])
@pytest.mark.parametrize("name", [name for name in MADE if MADE[name].first])
def test_runs_that_enter_at_different_steps(name: str, level: str) -> None:
    pipe = MADE[name].make()
    hrt.compile(pipe, uniform(pipe, MADE[name], level=level), backend="eager")
    for first, strength in ((2, 0.6), (1, 0.8), (4, 0.3), (2, 0.6)):
        made = replace(MADE[name], first=first)
        oracle = ByHand(made.make(), made, whole if level == "output" else trunk)
        assert relative_error(made.call(pipe, strength=strength), oracle.run(strength=strength)) < TOLERANCE


def test_order_2_and_no_order_are_as_by_hand() -> None:
    made = MADE["chroma"]
    for order in (0, 2):
        pipe = made.make()
        plain, models = made.call(pipe), models_of(pipe, made)
        hrt.compile(pipe, uniform(pipe, made, level="blocks", order=order), backend="eager")
        check_against(pipe, made, ByHand(made.make(), made, trunk, order=order), models, plain)


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (PNDMScheduler(steps_offset=1), 15),
        (PNDMScheduler(steps_offset=1, skip_prk_steps=True), 7),
        (HeunDiscreteScheduler(), 11),
        (KDPM2DiscreteScheduler(), 11),
    ],
)
@pytest.mark.parametrize("every", [2, 3])
def test_samplers_of_more_steps_than_asked_for(scheduler: Any, steps: int, every: int) -> None:
    """Two or more calls make one of their steps, some at the same timestep: each is a step of the schedule."""
    made = replace(MADE["sd"], steps=steps)

    def make() -> DiffusionPipeline:
        pipe = made.make()
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        return pipe

    pipe = make()
    plain, models = made.call(pipe), models_of(pipe, made)
    hrt.compile(pipe, uniform(pipe, made, every, level="output"), backend="eager")
    check_against(pipe, made, ByHand(make(), made, whole, every=lambda call: every), models, plain)


@pytest.mark.parametrize("name", [name for name in MADE if MADE[name].kept is None])
def test_nothing_is_read_from_a_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither timesteps nor other values can be looked at without waiting."""
    monkeypatch.setattr("harmonica_rt.compiled.read_timestep", lambda timestep: None)
    monkeypatch.setattr("harmonica_rt.calling._equal", lambda a, b: False)
    made = MADE[name]
    pipe = made.make()
    plain, models = made.call(pipe), models_of(pipe, made)
    hrt.compile(pipe, uniform(pipe, made, level="output"), backend="eager")
    check_against(pipe, made, ByHand(made.make(), made, whole), models, plain)
