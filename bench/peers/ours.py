"""This runtime: uniform schedules, learned ones, and reuse of the model's output (METHOD's sceptic's baseline)."""

from __future__ import annotations

from pathlib import Path

import harmonica_rt as hrt

from ..pipelines import PixelPipeline
from .base import Peer

SHIPPED = Path(__file__).parent.parent / "schedules"


def shipped(model: str, value: str) -> Path:
    sampler = "ddim20" if model == "dit-fashion" else "dpmsolver++20"
    return SHIPPED / f"{model}-{sampler}-{value}.json"


def schedule(pipeline: PixelPipeline, setting: str, steps: int) -> hrt.Schedule:
    """``uniform N``, ``output N`` (the output reused but every Nth step), or a shipped file: ``learned SPEED-UP``, and
    ``learned-output N``, the output reused with weights learned by the same trainer."""
    kind, value = setting.split()
    if kind.startswith("learned"):
        model = "dit-fashion" if pipeline.context is None else "pixart-emoji"
        return hrt.Schedule.load(shipped(model, f"output{value}" if kind == "learned-output" else value))
    pipeline.scheduler.set_timesteps(steps)
    known = {"sampler": type(pipeline.scheduler).__name__, "timesteps": pipeline.scheduler.timesteps}
    uniform = hrt.Schedule.uniform(pipeline.transformer, steps, int(value), **known)
    return uniform if kind == "uniform" else uniform.replace(output=~uniform.compute.any((1, 2)))


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    return hrt.compile(pipeline, schedule(pipeline, setting, steps))


UNIFORM = Peer("harmonica_rt, uniform", ("uniform 2", "uniform 3", "uniform 4"), prepare)
LEARNED = Peer(
    "harmonica_rt, learned",
    tuple(f"learned {value}" for value in ("1.5x", "2x", "2.9x", "3x", "4x")),
    prepare,
    applies=lambda model, setting: shipped(model, setting.split()[1]).is_file(),
)
OUTPUT = Peer(
    "output reuse",
    ("output 2", "output 3", "output 4", "learned-output 2", "learned-output 3"),
    prepare,
    applies=lambda model, setting: (
        setting.startswith("output") or shipped(model, f"output{setting.split()[1]}").is_file()
    ),
)
