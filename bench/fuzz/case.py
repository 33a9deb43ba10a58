"""A case of the campaign: a model, its schedules, what happens to it. Plain values, so that its text is its code."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Plan:
    """A schedule.

    Attributes:
        compute: a step each, a "1" for each entry that is computed, "0" else; empty rows at level output.
        output: a "1" for each step that reuses the output.
        weights: seed of random ones; the forecast's unless given.
        carry: of all reused streams.
        channels: seed of random weights per channel, if any.
        forecast: what it extrapolates over.
    """

    compute: tuple[str, ...]
    output: str
    order: int = 1
    weights: int | None = None
    carry: float = 0.0
    channels: int | None = None
    forecast: str = "index"

    @property
    def steps(self) -> int:
        return len(self.compute)


@dataclass(frozen=True)
class Run:
    """A run of the sampler, or a part of one.

    Attributes:
        seed: of its samples and conditioning.
        start, stop: first step, and the one behind the last; to the end unless given.
        batch: how many are denoised together, where the model's calls can be of any batch.
        shape: number of a variant of the model's calls.
        contexts: calls a step. Where a case has two plans there are two, named.
        named: whether `cache_context` tells them apart; else what they are conditioned on.
        half: (step, which): from this step on only one half of the batch is called.
        fails: (step, operations): at this step an exception comes after so many operations, which ends the run.
        refused: a step before whose call one of another batch is made, which is to be refused.
        beside: seed of a run of the second compiled model, call by call with this one.
    """

    seed: int = 0
    start: int = 0
    stop: int | None = None
    batch: int = 2
    shape: int = 0
    contexts: int = 1
    named: bool = False
    half: tuple[int, int] | None = None
    fails: tuple[int, int] | None = None
    refused: int | None = None
    beside: int | None = None


@dataclass(frozen=True)
class Change:
    """Other weights, between runs.

    Attributes:
        kind: "in place", "parameter" (another object), "load" and "load compiled" (a state dict, through the model or
            what it was compiled to), "lora", "lora scale", "lora off", "lora on".
        seed: of the new numbers.
    """

    kind: str
    seed: int = 0


@dataclass(frozen=True)
class Recompile:
    """The plain model back, called once, and compiled anew."""


Event = Run | Change | Recompile


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        model: one of `models.NAMES`.
        groups: at level blocks, how many groups a list is split into.
        trunk: at level branches, the trunk is an entry beside them.
        sampler: class of diffusers whose timesteps the calls have; evenly falling ones unless given.
        listed: whether the schedules know the timesteps.
        plans: one, or one each for contexts "cond" and "uncond".
        second: the plan of another compiled model on the same weights, which `Run.beside` runs.
    """

    model: str
    level: str
    plans: tuple[Plan, ...]
    events: tuple[Event, ...] = (Run(),)
    groups: int = 1
    trunk: bool = False
    backend: str = "eager"
    dtype: str = "float32"
    sampler: str | None = None
    listed: bool = False
    second: Plan | None = None


def source(value: Any) -> str:
    """Python that makes it, without what is as by default."""
    if isinstance(value, tuple):
        inner = ", ".join(map(source, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if not isinstance(value, Case | Plan | Run | Change | Recompile):
        return repr(value)
    given = [
        (field.name, getattr(value, field.name))
        for field in fields(value)
        if field.default is MISSING or getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(f'{name}={source(each)}' for name, each in given)})"


def script(case: Case, why: str) -> str:
    """A script that fails by itself, run from the repository root."""
    said = "".join(f"# {line}\n" for line in why.splitlines()[:4])
    lines = [f"    {field.name}={source(getattr(case, field.name))},\n" for field in fields(case)]
    plain = [f"    {field.name}={source(field.default)},\n" for field in fields(case)]
    body = "".join(line for line, default in zip(lines, plain) if line != default)
    head = "import sys\n\nsys.path.insert(0, '.')\nfrom bench.fuzz import *\n\n"
    return f"{said}{head}check(Case(\n{body}))\n"
