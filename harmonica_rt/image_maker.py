"""Images for whoever asks: a pipeline compiled for schedules by name, called in batches of a few fixed sizes."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import compiling
from .generating import Generation, load_pipeline
from .pictures import middle, samples_of
from .pipeline_copies import another
from .schedule import Schedule
from .schedule_specs import parse_schedule, steps_of

NUMBERS = ("guidance_scale", "true_cfg_scale")
SETTINGS = ("height", "width", "num_inference_steps", *NUMBERS, "negative_prompt")  # that may come with a prompt
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Bucket:
    """What images must have in common to be made by one call.

    Attributes:
        schedule: by name.
        settings: those of `SETTINGS` that are arguments of the pipeline's call, sorted by name.
        negative: whether each has a negative prompt.
    """

    schedule: str
    settings: tuple[tuple[str, Any], ...]
    negative: bool


@dataclass(frozen=True)
class Asked:
    """One image that is asked for.

    Attributes:
        subject: a prompt, or the number of a class.
        seed: of its noise.
        negative_prompt: None where it has none.
    """

    bucket: Bucket
    subject: str | int
    seed: int
    negative_prompt: str | None = None


class ImageMaker:
    """A pipeline compiled for several schedules, which share its parts.

    A call is of one of a few fixed numbers of images, so that a plan exists for each: what is beyond those asked for
    repeats the last one and is dropped. Each image's noise is from a generator of its own, of its seed, so with one
    size of batch, the default, a seed's image is always the same. Between sizes it may differ by rounding, as kernels
    of other shapes add up in another order. Measured on a CPU in fp32, batches of 1, 2, 4 and 8: companions, place and
    padding never changed a bit; other sizes did not on dit-fashion (eager, inductor) and flux-emoji at level branches,
    and by 1.2e-5 of [0, 1] at level blocks, 1 of 255 in 0.014 % of an image's values. Pipelines that pad a call's
    prompts to its longest one (Qwen-Image) make an image depend on its companions, too.

    Args:
        load: a folder or hub name of a diffusers pipeline, or a callable that returns one.
        schedules: by name, what `compile` takes, or a file or a spec (``"uniform:2"``, see `schedule_specs`).
        sizes: (height, width) in pixels that may be asked for, the first unless asked; the pipeline's own, and no
            other, if empty.
        batches: images a call.
        call: arguments of every call of the pipeline, unless asked otherwise. ``num_inference_steps`` is the
            schedule's unless given.
        backend: as `compile` takes it.

    Attributes:
        calls: that were made.
        hits: those of them for which all plans were there.

    Raises:
        TypeError, ValueError: naming what was expected and what came.
    """

    def __init__(
        self,
        load: str | Callable[[], Any],
        schedules: Mapping[str, Any],
        *,
        sizes: Sequence[tuple[int, int]] = (),
        batches: Sequence[int] = (4,),
        call: Mapping[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        for batch in batches:
            if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
                raise ValueError(f"batches: expected positive integers, got {batch!r}")
        if not batches or not schedules:
            raise ValueError("batches, schedules: expected at least one of each, got none")
        self.sizes, self.batches = [(int(height), int(width)) for height, width in sizes], sorted(set(batches))
        self.call, self.calls, self.hits = dict(call or {}), 0, 0
        pipeline = load() if callable(load) else load_pipeline(str(load))
        if not (denoisers := compiling.denoisers_of(pipeline)):
            raise TypeError(f"load: expected a pipeline with a denoiser and a scheduler, got {type(pipeline).__name__}")
        self.steps: dict[str, int] = {}
        self.pipelines: dict[str, Any] = {}  # by schedule
        plans = 2 * len(self.batches) * max(1, len(self.sizes))  # with guidance and without
        for name, wanted in schedules.items():
            steps = self.call.get("num_inference_steps")
            if isinstance(wanted, (str, Path)):
                named = steps or steps_of(str(wanted)) or Generation(pipeline, [self._example(pipeline)]).steps
                wanted = parse_schedule(str(wanted), next(iter(denoisers.values())), named)
            self.steps[name] = steps or _steps(wanted)
            self.pipelines[name] = compiling.compile(another(pipeline), wanted, backend=backend, plans=plans)

    @property
    def largest(self) -> int:
        """Images a call, at most."""
        return self.batches[-1]

    def size_for(self, count: int) -> int:
        """Images of the call that makes so many."""
        return next(batch for batch in self.batches if batch >= count)

    def read(self, prompt: str | int, seed: int = 0, schedule: str | None = None, **settings: Any) -> Asked:
        """What somebody asks for, checked before it takes a place in a batch.

        Args:
            prompt: a text; a number or name of a class where the pipeline takes labels.
            schedule: by name; the first unless given.
            settings: some of `SETTINGS`; None is as not given.

        Raises:
            TypeError, ValueError: naming what was expected and what came.
        """
        name = next(iter(self.pipelines)) if schedule is None else schedule
        if name not in self.pipelines:
            raise ValueError(f"schedule: expected one of {', '.join(self.pipelines)}, got {name!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seed: expected an integer from 0 to {LARGEST_SEED}, got {seed!r}")
        if other := settings.keys() - set(SETTINGS):
            raise TypeError(f"{min(other)}: expected prompt, seed, schedule, {', '.join(SETTINGS)} to ask by")
        settings = {key: value for key, value in settings.items() if value is not None}
        for key in settings.keys() & set(NUMBERS):
            settings[key] = _number(key, settings[key])
        self._check_steps(name, settings)
        own = {key: value for key, value in self.call.items() if key in SETTINGS} | settings
        own |= {"num_inference_steps": self.steps[name], **self._size(settings)}
        negative = own.get("negative_prompt")
        if not isinstance(negative, (str, type(None))):
            raise TypeError(f"negative_prompt: expected a text, got {negative!r}")
        generation = Generation(self.pipelines[name], [prompt], **{**self.call, **own})
        own.pop("negative_prompt", None)
        bucket = Bucket(name, tuple(sorted(own.items())), negative is not None)
        return Asked(bucket, generation.subjects[0], seed, negative)

    def make(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """Of each its image, uint8 [height, width, 3]; of a video the frame in the middle.

        Args:
            asked: of one bucket, at most `largest`.

        Raises:
            FloatingPointError: an image is not finite.
        """
        bucket = asked[0].bucket
        if len(asked) > self.largest or any(each.bucket != bucket for each in asked):
            kinds = len({each.bucket for each in asked})
            raise ValueError(f"expected at most {self.largest} images of one bucket, got {len(asked)} of {kinds}")
        size = self.size_for(len(asked))
        padded = [*asked, *[asked[-1]] * (size - len(asked))]
        own: dict[str, Any] = {"generator": [torch.Generator().manual_seed(each.seed) for each in padded]}
        if bucket.negative:
            own["negative_prompt"] = [each.negative_prompt for each in padded]
        pipeline, before = self.pipelines[bucket.schedule], self._plans(bucket.schedule)
        call = {**self.call, **dict(bucket.settings)}
        generation = Generation(pipeline, [each.subject for each in padded], **call)
        samples = samples_of(generation.generation(range(size), **own, output_type="np"))[: len(asked)]
        self.calls, self.hits = self.calls + 1, self.hits + (self._plans(bucket.schedule) <= before)
        if not all(np.isfinite(frames).all() for frames in samples):
            raise FloatingPointError(f"schedule {bucket.schedule!r}: expected finite images, got others")
        return [middle(frames) for frames in samples]

    def warm_up(self) -> dict[str, float]:
        """Make the plans that requests without settings of their own need; seconds that each took."""
        taken: dict[str, float] = {}
        sizes: list[tuple[int, int] | None] = [*self.sizes] or [None]
        for name, pipeline in self.pipelines.items():
            for size in sizes:
                settings = {} if size is None else {"height": size[0], "width": size[1]}
                for batch in self.batches:
                    began = time.perf_counter()
                    self.make([self.read(self._example(pipeline), schedule=name, **settings)] * batch)
                    shape = "" if size is None else f" of {size[0]}x{size[1]}"
                    taken[f"{name}, {batch}{shape}"] = time.perf_counter() - began
        self.calls = self.hits = 0
        return taken

    def _check_steps(self, name: str, settings: Mapping[str, Any]) -> None:
        if settings.get("num_inference_steps", self.steps[name]) != self.steps[name]:
            have = ", ".join(f"{other} of {steps}" for other, steps in self.steps.items())
            raise ValueError(
                f"num_inference_steps: expected {self.steps[name]}, the steps of schedule {name!r}, got "
                f"{settings['num_inference_steps']!r}; there are {have}"
            )

    def _size(self, settings: Mapping[str, Any]) -> dict[str, int]:
        given = {side: settings[side] for side in ("height", "width") if side in settings}
        if not self.sizes:
            if given:
                got = ", ".join(f"{side} {value!r}" for side, value in given.items())
                raise ValueError(f"height, width: expected none, the pipeline's own size is served, got {got}")
            return {}
        wanted = tuple(given.get(side, own) for side, own in zip(("height", "width"), self.sizes[0]))
        if wanted not in self.sizes:
            sizes = ", ".join(f"{height}x{width}" for height, width in self.sizes)
            raise ValueError(f"height, width: expected one of {sizes}, got {wanted[0]!r}x{wanted[1]!r}")
        return dict(zip(("height", "width"), self.sizes[self.sizes.index(wanted)]))

    def _plans(self, schedule: str) -> set[tuple[int, Any]]:
        found = compiling.denoisers_of(self.pipelines[schedule]).values()
        compiled = [denoiser for denoiser in found if compiling.is_compiled(denoiser)]
        return {(number, key) for number, denoiser in enumerate(compiled) for key in denoiser._plans}

    @staticmethod
    def _example(pipeline: Any) -> str | int:
        """What can be asked of any such pipeline."""
        return 0 if "class_labels" in inspect.signature(type(pipeline).__call__).parameters else ""


def _steps(schedule: Any) -> int:
    return schedule.steps if isinstance(schedule, Schedule) else _steps(next(iter(schedule.values())))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)
