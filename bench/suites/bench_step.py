"""One denoiser step of dit-fashion by how much of it is reused: CUR 0 to 100 % of that step."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import harmonica_rt as hrt
from bench.models.pipelines import PixelPipeline
from bench.models.reference import load_pipeline

from .conftest import inductor

SAMPLES, STEPS = 8, 3  # four images with guidance; two steps fill what the third one reuses
GROUP = f"one step, dit-fashion, {SAMPLES} samples"


@cache
def pipeline() -> PixelPipeline:
    return load_pipeline("dit-fashion")


def schedule(percent: int) -> hrt.Schedule:
    """The third step reuses `percent` of its attentions and as much of its MLPs, each spread over the layers."""
    model = pipeline().transformer
    full = hrt.Schedule.full(model, STEPS, order=1, timesteps=pipeline().timesteps(STEPS))
    compute = full.compute.copy()
    reached = np.arange(full.layers + 1) * percent // 100
    reused = np.diff(reached) > 0
    compute[-1, :, 0], compute[-1, :, 1] = ~reused, ~reused[::-1]
    return full.replace(compute=compute)


def call(model: nn.Module, step: int, samples: list[torch.Tensor]) -> None:
    timestep = torch.full((SAMPLES,), pipeline().timesteps(STEPS)[step])
    model(samples[step], timestep=timestep, class_labels=torch.arange(SAMPLES))


def inputs() -> list[torch.Tensor]:
    return [torch.randn(SAMPLES, 1, 28, 28) for _ in range(STEPS)]


@pytest.mark.parametrize("backend", ["eager", inductor()])
@pytest.mark.parametrize("percent", [0, 25, 50, 75, 100])
def test_step(benchmark: Any, percent: int, backend: str) -> None:
    benchmark.group = GROUP
    plan = schedule(percent)
    assert 1 - plan.compute[-1].mean() == percent / 100
    fast, samples = hrt.compile(pipeline().transformer, plan, backend=backend), inputs()

    def before() -> None:
        for step in range(STEPS - 1):
            call(fast, step, samples)

    benchmark.pedantic(call, args=(fast, STEPS - 1, samples), setup=before, rounds=12, warmup_rounds=1)
    benchmark.extra_info["launches"] = fast.report().plans[0].launches[-1]


def test_step_of_diffusers(benchmark: Any) -> None:
    benchmark.group = GROUP
    with torch.no_grad():
        benchmark.pedantic(call, args=(pipeline().transformer, STEPS - 1, inputs()), rounds=12, warmup_rounds=1)
