"""How a reference model's images are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

import harmonica_rt as hrt
from harmonica_rt.train import models

from .pipelines import PixelPipeline
from .reference import REFERENCES, load_pipeline

CLOSER = 2  # times the steps that learning aims at


@dataclass(frozen=True)
class Sampling:
    """How every row's images are made: `pipeline`, as it is, with the model's own guidance unless given.

    Attributes:
        classes: labels in turn; the pipeline's examples unless given.
    """

    pipeline: PixelPipeline
    guidance: float
    classes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, name: str, sampler: str | None = None, guidance: float | None = None, classes: Any = None) -> Sampling:
        """A reference model's, with another `sampler` than its own if one is given."""
        pipeline = load_pipeline(name)
        if sampler is not None:
            pipeline.scheduler = models.scheduler(sampler, pipeline.scheduler.config)
        return cls(pipeline, REFERENCES[name].guidance if guidance is None else guidance, classes)

    def labels(self, count: int) -> list[Any]:
        """What `count` images are to be."""
        return self.pipeline.examples(count) if self.classes is None else list(islice(cycle(self.classes), count))

    def __call__(self, start: Tensor, steps: int, batch: int = 16) -> Tensor:
        """Images as sampled, [count, channels, height, width]."""
        labels = self.labels(len(start))
        parts = [
            self.pipeline(
                labels[i : i + batch], self.guidance, num_inference_steps=steps, latents=part, output_type="latent"
            ).images
            for i, part in zip(range(0, len(start), batch), start.split(batch))
        ]
        return torch.cat(parts)

    def converged(self, start: Tensor) -> Tensor:
        """The solution that this sampler's runs approximate."""
        from harmonica_rt.train.converged import converged  # needs the extra `train`

        pipeline = self.pipeline.around(self.pipeline.transformer)
        pipeline.scheduler, steps = converged(pipeline.scheduler)
        steps *= CLOSER
        return Sampling(pipeline, self.guidance, self.classes)(start, steps)


@contextmanager
def accelerated(
    pipeline: PixelPipeline, schedule: hrt.Schedule | dict[str, hrt.Schedule], **options: Any
) -> Iterator[None]:
    """With `pipeline` compiled for `schedule`; `options` are `harmonica_rt.compile`'s."""
    hrt.compile(pipeline, schedule, **options)
    try:
        yield
    finally:
        hrt.uncompile(pipeline)
