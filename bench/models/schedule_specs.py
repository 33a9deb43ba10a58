"""Schedules by short names, as the benches take them: the package's, and random ones."""

from __future__ import annotations

from typing import Any

import numpy as np

import harmonica_rt as hrt
from harmonica_rt import schedule_specs

from .pipelines import PixelPipeline

SPECS = f"{schedule_specs.SPECS}, random:PERCENT[:ORDER[:SEED]]"


def parse_schedule(text: str, pipeline: PixelPipeline, steps: int) -> hrt.Schedule:
    """A schedule file, or one of `SPECS` for the pipeline.

    Here ``uniform`` is of level branches whatever the model. Random: that share of all branches is reused, the hardest
    kind for a runtime, no two steps alike.
    """
    known = {"sampler": type(pipeline.scheduler).__name__, "timesteps": pipeline.timesteps(steps)}
    name, *parts = text.split(":")
    if name == "random" and 1 <= len(parts) <= 3 and all(part.isdigit() for part in parts):
        return _random(text, pipeline, steps, [int(part) for part in parts], known)
    return schedule_specs.parse_schedule(text, pipeline.transformer, steps, SPECS, uniform="branches", **known)


def _random(text: str, pipeline: PixelPipeline, steps: int, numbers: list[int], known: dict[str, Any]) -> hrt.Schedule:
    percent, order, seed = [*numbers, *(1, 0)[len(numbers) - 1 :]]
    like = hrt.Schedule.full(pipeline.transformer, steps, order=order, level="branches", **known)
    compute, rng = like.compute.copy(), np.random.default_rng(seed)
    later, reused = compute[1:].size, round(percent / 100 * compute.size)
    if reused > later:
        most = 100 * later // compute.size
        raise ValueError(f"--schedule: expected at most {most} % reused in {steps} steps, got {text!r}")
    compute[1:].reshape(-1)[rng.permutation(later)[:reused]] = False
    return like.replace(compute=compute, note=f"random, {percent} % reused, order {order}, seed {seed}")
