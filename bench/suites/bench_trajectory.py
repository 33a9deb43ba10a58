"""A whole run of dit-fashion, DDIM 20 with guidance: diffusers, every step computed by ours, and `uniform:2`."""

from __future__ import annotations

from typing import Any

import pytest

import harmonica_rt as hrt
from bench.models.pipelines import PixelPipeline
from bench.models.reference import REFERENCES, load_pipeline, noise

from .conftest import inductor

IMAGES, STEPS = 4, 20


def sample(pipeline: PixelPipeline) -> Any:
    call = {"num_inference_steps": STEPS, "latents": noise(pipeline, IMAGES), "output_type": "latent"}
    return pipeline(pipeline.examples(IMAGES), REFERENCES["dit-fashion"].guidance, **call).images


@pytest.mark.parametrize(
    ("schedule", "backend"),
    [("full", "diffusers"), ("full", "eager"), inductor("full"), ("uniform:2", "eager"), inductor("uniform:2")],
)
def test_trajectory(benchmark: Any, schedule: str, backend: str) -> None:
    benchmark.group = f"{IMAGES} images, dit-fashion, {STEPS} steps"
    pipeline = load_pipeline("dit-fashion")
    if backend != "diffusers":
        every = 2 if schedule == "uniform:2" else 1
        known = pipeline.timesteps(STEPS)
        plan = hrt.Schedule.uniform(pipeline.transformer, STEPS, every, timesteps=known)
        benchmark.extra_info["theoretical"] = plan.speedup(pipeline.transformer)
        hrt.compile(pipeline, plan, backend=backend)
    benchmark.pedantic(sample, args=(pipeline,), rounds=4, warmup_rounds=1)
