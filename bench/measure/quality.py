"""Images of schedules beside the full run's from the same noise: PSNR, and what they are worth as a set."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import harmonica_rt as hrt
from bench.models.pipelines import PixelPipeline
from bench.models.reference import CLASSES, TRAINED, noise
from bench.models.sampling import Sampling, accelerated
from bench.models.schedule_specs import parse_schedule
from harmonica_rt.measuring import pooled_psnr, psnr

from . import costs
from .environment import environment
from .frechet import WIDTH
from .judges import Frechet

MODEL = "dit-fashion"
ALL = tuple(range(len(CLASSES)))
TARGETS = {"full": "the full run", "converged": "the converged solution"}
FEWER = (14, 10, 7, 5)
FULL, PSNR = "full run", ("mean", "pooled", "worst")


def load_schedule(text: str, pipeline: PixelPipeline, steps: int) -> tuple[str, hrt.Schedule]:
    """A row's name and its schedule, `text` as in `parse_schedule`.

    Raises:
        ValueError: it was made for another sampler. Another guidance is fine.
    """
    schedule, sampler = parse_schedule(text, pipeline, steps), type(pipeline.scheduler).__name__
    if schedule.sampler not in (None, sampler):
        raise ValueError(f"{text}: the schedule was made for {schedule.sampler}, --sampler samples with {sampler}")
    return Path(text).stem if Path(text).is_file() else text, schedule


def measure(
    schedules: tuple[str, ...],
    *,
    model: str = MODEL,
    steps: int,
    count: int,
    seed: int,
    seeds: int = 1,
    fewer: tuple[int, ...] = FEWER,
    frechet: int = 0,
    target: str = "full",
    sampler: str | None = None,
    guidance: float | None = None,
    classes: tuple[int, ...] | None = None,
    twins: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run the comparison; the result is what ``--json`` writes.

    Args:
        count: noises a seed; `seeds` of them are used, from `seed` on.
        frechet: images a row for the Fréchet distance; 0 leaves it out, and the full run's own row with it.
        target: what PSNR is taken to: "full", the sampler's run without reuse, or "converged", the solution from the
            same noise. With that the full run has a row, the first.
        model: a trained reference model.
        sampler: of `models.SAMPLERS`, for all rows; the model's own unless given.
        guidance: for all rows, whatever the schedules were made for; none unless above 1; the model's own unless given.
        classes: dit-fashion's labels to sample, in turn; all of them unless given.
        twins: after each schedule with learned weights, a row for the same one with the forecast's.
    """
    if frechet and frechet <= WIDTH:
        raise ValueError(f"--frechet: expected 0 or more images than the classifier's {WIDTH} features, got {frechet}")
    if target not in TARGETS:
        raise ValueError(f"--target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if model not in TRAINED:
        raise ValueError(f"--model: expected one of {', '.join(TRAINED)}, got {model!r}")
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"--guidance: expected a finite number, got {guidance}")
    if model != MODEL and (frechet or classes is not None):
        raise ValueError(f"--frechet and --classes: expected --model {MODEL}, which has a classifier, got {model}")
    if classes is not None and (not classes or not set(classes) <= set(ALL)):
        raise ValueError(f"--classes: expected labels from 0 to {ALL[-1]}, got {list(classes)}")
    sampling = Sampling.of(model, sampler, guidance, None if classes is None else tuple(classes))
    pipeline = sampling.pipeline
    plans = [load_schedule(text, pipeline, steps) for text in schedules]
    start = torch.cat([noise(pipeline, count, seed + i) for i in range(seeds)])
    progress(f"full run, {steps} steps")
    full = wanted = sampling(start, steps)
    rows, judge = [], None
    if target == "converged":
        progress(TARGETS[target])
        wanted = sampling.converged(start)
        rows.append(_row(FULL, 0.0, 1.0, full, wanted, seeds))
    elif frechet:
        rows.append({"name": FULL, "cur": 0.0, "theoretical": 1.0} | dict.fromkeys((*PSNR, "by_seed")))
    if frechet:
        progress(f"full run, {steps} steps, {2 * frechet} images")
        with accelerated(pipeline, parse_schedule("full", pipeline, steps)):
            judge = Frechet.prepare(sampling, steps, frechet, seed)
            rows[0] |= judge(sampling, steps)

    def measured(name: str, schedule: hrt.Schedule) -> dict[str, Any]:
        progress(name)
        with accelerated(pipeline, schedule):
            images = sampling(start, steps)
            theoretical = costs.theoretical(pipeline.transformer.report())
            row = _row(name, schedule.cur, theoretical, images, wanted, seeds)
            return row | (judge(sampling, steps) if judge else {})

    for name, schedule in plans:
        rows.append(row := measured(name, schedule))
        if twins and schedule.learned:
            rows.append(twin := measured(f"{name}, forecast", schedule.replace(weights=None, output_weights=None)))
            row["gain"] = row["mean"] - twin["mean"]
    for less in (n for n in fewer if n < steps):
        progress(f"{less} steps")
        row = _row(f"{less} steps", 1 - less / steps, steps / less, sampling(start, less), wanted, seeds)
        if judge:
            with accelerated(pipeline, parse_schedule("full", pipeline, less)):
                row |= judge(sampling, less)
        rows.append(row)
    run = {"model": model, "steps": steps, "count": count, "frechet": frechet, "seed": seed, "seeds": seeds}
    sampled = {"sampler": type(pipeline.scheduler).__name__, "guidance": sampling.guidance}
    run |= {"target": target, "classes": classes and list(classes)} | sampled
    return run | {"environment": environment(), "rows": rows}


def _row(name: str, cur: float, theoretical: float, images: Tensor, wanted: Tensor, seeds: int) -> dict[str, Any]:
    values = psnr(images, wanted)
    return {
        "name": name,
        "cur": cur,
        "theoretical": theoretical,
        "mean": values.mean().item(),
        "pooled": pooled_psnr(images, wanted),
        "worst": values.min().item(),
        "by_seed": [part.mean().item() for part in values.chunk(seeds)],
    }
