"""Schedules by short names, as the commands take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import harmonica_rt as hrt

from .pipelines import PixelPipeline

SPECS = (
    "full, uniform:N[:ORDER], trunk:N[:ORDER][:carry=C], blocks:N[:ORDER][:groups=G][:carry=C], output:N[:ORDER], "
    "random:PERCENT[:ORDER[:SEED]]"
)  # every Nth step computed
LEVELS: dict[str, tuple[str, dict[str, type]]] = {
    "uniform": ("branches", {}),
    "trunk": ("branches", {"carry": float}),
    "blocks": ("blocks", {"groups": int, "carry": float}),
    "output": ("output", {}),
}  # of a spec, and its options


def parse_schedule(text: str, pipeline: PixelPipeline, steps: int) -> hrt.Schedule:
    """A schedule file, or one of `SPECS` for the pipeline.

    ``uniform`` is of level branches, and so is ``trunk``, the trunk reused as one entry. Random: that share of all
    branches is reused, the hardest kind for a runtime, no two steps alike.
    """
    known = {"sampler": type(pipeline.scheduler).__name__, "timesteps": pipeline.timesteps(steps)}
    name, *parts = text.split(":")
    numbers = [int(part) for part in parts if part.isdigit()]
    options = [part.split("=", 1) for part in parts if not part.isdigit()]
    if all(len(option) == 2 for option in options):
        if name == "full" and not parts:
            return hrt.Schedule.full(pipeline.transformer, steps, **known)
        if name in LEVELS and 1 <= len(numbers) <= 2:
            level, kinds = LEVELS[name]
            taken = _options(text, dict(options), kinds) | ({"trunk": True} if name == "trunk" else {})
            every, order = [*numbers, 1][:2]
            return hrt.Schedule.uniform(pipeline.transformer, steps, every, order, level=level, **taken, **known)
        if name == "random" and 1 <= len(numbers) == len(parts) <= 3:
            return _random(text, pipeline, steps, numbers, known)
    if not Path(text).is_file():
        raise ValueError(f"--schedule: expected {SPECS} or a schedule file, got {text!r}")
    return hrt.Schedule.load(text)


def _options(text: str, options: dict[str, str], kinds: dict[str, type]) -> dict[str, Any]:
    try:
        return {name: kinds[name](value) for name, value in options.items()}
    except (KeyError, ValueError):
        raise ValueError(f"--schedule: expected {SPECS} or a schedule file, got {text!r}") from None


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
