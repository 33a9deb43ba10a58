"""What changes from one run of a compiled pipeline to the next: its inputs, its guidance, runs that end early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import harmonica_rt as hrt

from ..conftest import relative_error
from .by_hand import ByHand, trunk
from .made import MADE
from .parts import STEPS, TEXT, Made, alone, noise, pooled

TOLERANCE = 1e-5


def compiled(made: Made) -> DiffusionPipeline:
    pipe = made.make()
    schedule = hrt.Schedule.uniform(getattr(pipe, made.denoisers[0]), STEPS, level="blocks")
    return hrt.compile(pipe, schedule, backend="eager")


def by_hand(made: Made, **changes: Any) -> torch.Tensor:
    return ByHand(made.make(), made, trunk).run(**changes)


LONGER = {"prompt_embeds": noise(1, 9, TEXT), "negative_prompt_embeds": noise(1, 9, TEXT, seed=2)}
TWO = {name: torch.cat([states, -states]) for name, states in pooled().items()}
CHANGES = {
    "flux, true CFG": ({"height": 16}, TWO, LONGER, {"num_images_per_prompt": 2}),
    "flux.2 klein": ({"height": 16}, LONGER, {"num_images_per_prompt": 2}),
    "sd3": ({"height": 4}, TWO, LONGER, {"guidance_scale": 1.0}),
    "qwen": ({"height": 32}, {"num_images_per_prompt": 2}),
    "z-image": ({"height": 32}, {"guidance_scale": 0.0}, {"num_images_per_prompt": 2}),
    "wan 2.2": ({"num_frames": 5}, {"height": 16}, LONGER, {"num_videos_per_prompt": 2}),
    "lumina2": ({"height": 32}, {"width": 32}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_inputs_change(name: str) -> None:
    made = MADE[name]
    pipe = compiled(made)
    for changes in ({}, *CHANGES[name], {}):
        assert relative_error(made.call(pipe, **changes), by_hand(made, **changes)) < TOLERANCE, changes


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("flux, true CFG", {"true_cfg_scale": 1.0}),
        ("qwen", {"true_cfg_scale": 1.0}),
        ("hunyuan", {"true_cfg_scale": 1.0}),
        ("wan 2.1", {"guidance_scale": 1.0}),
        ("wan 2.2", {"guidance_scale": 1.0}),
        ("chroma", {"guidance_scale": 1.0}),
        ("lumina2", {"guidance_scale": 1.0}),
    ],
)
def test_guidance_in_calls_of_its_own_is_switched_off_and_on(name: str, without: dict[str, float]) -> None:
    guided = MADE[name]
    unguided = replace(guided, contexts=alone)
    pipe = compiled(guided)
    for made, changes in ((guided, {}), (unguided, without), (unguided, without), (guided, {})):
        assert relative_error(made.call(pipe, **changes), by_hand(made, **changes)) < TOLERANCE, changes


def flag_after(last: int) -> Callable[..., dict[str, Any]]:
    def end(pipe: DiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == last
        return tensors

    return end


def error_after(last: int) -> Callable[..., dict[str, Any]]:
    def end(pipe: DiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise KeyboardInterrupt
        return tensors

    return end


ENDED = ["flux, true CFG", "flux, inpainting", "sd3, skipped layers", "wan 2.2", "chroma", "lumina2", "cogvideox"]


@pytest.mark.parametrize("name", ENDED)
def test_a_run_that_is_ended_leaves_the_next_one_whole(name: str) -> None:
    """By the pipeline's own flag, where it has one, and by an error; after each step."""
    made = MADE[name]
    pipe = compiled(made)
    wanted = made.call(pipe)

    for step in range(STEPS - made.first - 1):
        if hasattr(pipe, "interrupt"):
            assert not torch.equal(made.call(pipe, callback_on_step_end=flag_after(step)), wanted)
            assert torch.equal(made.call(pipe), wanted)
        with pytest.raises(KeyboardInterrupt):
            made.call(pipe, callback_on_step_end=error_after(step))
        assert torch.equal(made.call(pipe), wanted)


def test_one_transformer_in_three_pipelines() -> None:
    """`from_pipe`: text to image, image to image and inpainting, each with a schedule of its own."""
    names = ("flux", "flux, image to image", "flux, inpainting")
    first = MADE["flux"].make()
    pipes = [first] + [type(MADE[name].make())(**first.components) for name in names[1:]]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    plain = [MADE[name].call(pipe) for name, pipe in zip(names, pipes)]
    for every, pipe in zip((2, 3, 2), pipes):
        hrt.compile(pipe, hrt.Schedule.uniform(pipe.transformer, STEPS, every, level="blocks"), backend="eager")
    for _ in range(2):
        for name, every, pipe in zip(names, (2, 3, 2), pipes):
            made = MADE[name]
            wanted = ByHand(made.make(), made, trunk, every=lambda call, n=every: n).run()
            assert relative_error(made.call(pipe), wanted) < TOLERANCE, name
    for name, pipe, latents in zip(names, pipes, plain):
        hrt.uncompile(pipe)
        assert torch.equal(MADE[name].call(pipe), latents), name
