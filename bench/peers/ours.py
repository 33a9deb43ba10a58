"""This runtime: uniform schedules, learned ones, and reuse of the model's output (METHOD's sceptic's baseline)."""

from __future__ import annotations

from pathlib import Path

import harmonica_rt as hrt
from bench.models.pipelines import PixelPipeline
from harmonica_rt.train import models

from .base import Peer

SHIPPED = Path(__file__).parent.parent / "schedules"
SAMPLERS = {"dit-fashion": "ddim", "pixart-emoji": "dpmsolver++", "flux-emoji": "flow-euler"}  # their own


def shipped(model: str, setting: str) -> Path:
    """The file of ``learned [SAMPLER] NAME``."""
    sampler, name = [SAMPLERS[model], *setting.split()[1:]][-2:]
    file = SHIPPED / f"{model}-{sampler}20-{name}.json"
    return file if file.is_file() else file.with_suffix(".safetensors")  # weights per channel


def exists(model: str, setting: str) -> bool:
    return not setting.startswith("learned") or shipped(model, setting).is_file()


def schedule(pipeline: PixelPipeline, setting: str, steps: int) -> hrt.Schedule:
    """``uniform N``, ``output N`` (the output reused but every Nth step), or ``learned [SAMPLER] NAME``, a file."""
    if setting.startswith("learned"):
        return hrt.Schedule.load(shipped(pipeline.reference, setting))
    kind, every = setting.split()
    known = {"sampler": type(pipeline.scheduler).__name__, "timesteps": pipeline.timesteps(steps)}
    uniform = hrt.Schedule.uniform(pipeline.transformer, steps, int(every), **known)
    return uniform if kind == "uniform" else uniform.replace(output=~uniform.compute.reshape(steps, -1).any(1))


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    if len(words := setting.split()) == 3:
        pipeline.scheduler = models.scheduler(words[1], models.LINEAR)  # by its own timesteps
    return hrt.compile(pipeline, schedule(pipeline, setting, steps))


UNIFORM = Peer("harmonica_rt, uniform", ("uniform 1", "uniform 2", "uniform 3", "uniform 4", "uniform 5"), prepare)
LEARNED = Peer(
    "harmonica_rt, learned",
    ("learned 1.5x", "learned 2x", "learned 2.9x", "learned 3x", "learned 4x", "learned 5x"),
    prepare,
    applies=exists,
)
CONVERGED = Peer(
    "harmonica_rt, learned, to converged",
    ("learned 2x-converged", "learned 2.9x-converged", "learned 4x-converged", "learned dpmsolver++ 2x-converged"),
    prepare,
    applies=exists,
)
OUTPUT = Peer(
    "output reuse (this engine)",
    ("output 2", "output 3", "output 4", "learned output2", "learned output3"),
    prepare,
    applies=exists,
)
