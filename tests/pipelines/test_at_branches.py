"""Pipelines at level branches, against reuse at module level on the pipeline's own transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import harmonica_rt as hrt
from bench.by_hand.module_reuse import ModuleReuse

from ..conftest import BACKENDS, relative_error
from .made import MADE
from .parts import STEPS, Made

NAMES = ("flux", "flux, true CFG", "flux, image to image", "flux, inpainting")
NAMES += ("sd3 without dual attention", "wan 2.1", "wan 2.1, image to video", "wan 2.2")


def unpadded(made: Made) -> Made:
    """With text of which all tokens count: the pipeline then gives no mask."""

    def arguments() -> dict[str, Any]:
        given = made.arguments()
        return {name: torch.ones_like(t) if name.endswith("_mask") else t for name, t in given.items()}

    return replace(made, arguments=arguments)


RUN = {name: MADE[name] for name in NAMES} | {name: unpadded(MADE[name]) for name in ("qwen", "qwen, edit")}


def random_schedule(model: torch.nn.Module, order: int) -> hrt.Schedule:
    rng, full = np.random.default_rng(order), hrt.Schedule.full(model, STEPS, level="branches")
    compute = rng.random(full.compute.shape) >= 0.5
    compute[0] = True
    schedule = hrt.Schedule(compute, model=full.model, groups=full.groups, order=order)
    return schedule.replace(weights=schedule.weights * rng.normal(1.0, 0.3, schedule.weights.shape))


def by_module(made: Made, schedule: hrt.Schedule) -> torch.Tensor:
    pipe = made.make()
    for name in made.denoisers:
        first = next(call.step for call in made.calls if call.denoiser == name)
        stand_in = ModuleReuse(getattr(pipe, name), schedule.starting_at(first))
        object.__setattr__(pipe, name, stand_in)  # past the setter, which would write its class into the config
    return made.call(pipe)


def compiled(made: Made, schedule: hrt.Schedule, backend: str) -> DiffusionPipeline:
    return hrt.compile(made.make(), schedule, backend=backend)


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_run_is_the_pipelines_own(name: str, backend: str) -> None:
    made = RUN[name]
    plain = made.make()
    full = hrt.Schedule.full(plain.transformer, STEPS, level="branches")
    assert relative_error(made.call(compiled(made, full, backend)), made.call(plain)) < 1e-5


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_random_schedules_equal_reuse_at_module_level(name: str, order: int) -> None:
    made = RUN[name]
    schedule = random_schedule(made.make().transformer, order)
    wanted, pipe = by_module(made, schedule), compiled(made, schedule, "eager")
    for _ in range(2):
        assert relative_error(made.call(pipe), wanted) < 2e-5
    assert {getattr(pipe, denoiser).report().level for denoiser in made.denoisers} == {"branches"}


def test_control_residuals_are_refused_by_name() -> None:
    made = MADE["flux, ControlNet"]
    pipe = compiled(made, random_schedule(made.make().transformer, 1), "eager")
    with pytest.raises(
        ValueError, match=r"controlnet_block_samples: expected none at level 'branches'.*level 'blocks'"
    ):
        made.call(pipe)


def test_padded_text_is_refused_by_name() -> None:
    made = MADE["qwen"]
    pipe = compiled(made, random_schedule(made.make().transformer, 1), "eager")
    with pytest.raises(ValueError, match=r"encoder_hidden_states_mask: expected none at level 'branches'.*'blocks'"):
        made.call(pipe)
