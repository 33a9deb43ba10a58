"""Stronger samplers with fewer steps, judged to the converged solution too: to the 20-step run they cannot be close."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler

from bench.models import samplers
from bench.models.pipelines import PixelPipeline
from harmonica_rt.train import models

from .base import Peer


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    name, count = setting.split()
    if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        pipeline.scheduler = samplers.scheduler(f"flow-{name}", samplers.default(f"flow-{name}"), {})
    else:
        pipeline.scheduler = models.scheduler(name, pipeline.scheduler.config)
    pipeline.steps = int(count)
    return pipeline


SETTINGS = tuple(f"{name} {count}" for name in ("dpmsolver++", "unipc") for count in (20, 10, 7, 5))
PEER = Peer("another sampler", SETTINGS, prepare)
