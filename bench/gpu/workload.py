"""A model with random weights on the card, with what it is asked to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import harmonica_rt as hrt
from bench.models.pipelines import PixelPipeline
from bench.models.reference import REFERENCES, load_pipeline, noise
from bench.models.schedule_specs import parse_schedule

from .machine import Machine


@dataclass(frozen=True)
class Size:
    """A model as a case runs it.

    Attributes:
        name: as tables show it.
        model: one of `REFERENCES`.
        layers, side: other than the reference's.
    """

    name: str
    model: str
    layers: int | None = None
    side: int | None = None


class Workload:
    """A model, and whole runs of its pipeline from one noise.

    Args:
        batch: images of a run; guidance doubles the samples.
    """

    def __init__(self, machine: Machine, size: Size, batch: int, dtype: torch.dtype, steps: int) -> None:
        self.machine, self.size, self.batch, self.dtype, self.steps = machine, size, batch, dtype, steps
        self.pipeline = load_pipeline(size.model, size.layers, size.side, machine.device)
        if dtype != torch.float32:
            self.pipeline.to(dtype)
        self.guidance = REFERENCES[size.model].guidance
        self.model = self.pipeline.transformer
        self.noise = noise(self.pipeline, batch).to(machine.device, dtype)
        self.wanted = self.pipeline.examples(batch)

    def schedule(self, text: str) -> hrt.Schedule:
        return parse_schedule(text, self.pipeline, self.steps)

    def theory(self, schedule: hrt.Schedule) -> float:
        """Speed-up by MACs."""
        return schedule.speedup(self.model, context=self.pipeline.context)

    def around(self, denoiser: nn.Module) -> PixelPipeline:
        return self.pipeline.around(denoiser)

    def compiled(self, schedule: hrt.Schedule, backend: str) -> PixelPipeline:
        return hrt.compile(self.around(self.model), schedule, backend=backend)

    def sample(self, pipeline: PixelPipeline) -> Tensor:
        """The latents of a run; the device may still be at work on them."""
        call = {"num_inference_steps": self.steps, "latents": self.noise, "output_type": "latent"}
        return pipeline(self.wanted, self.guidance, **call).images

    @torch.no_grad()
    def trajectory(self, fast: PixelPipeline) -> Callable[[], Tensor]:
        """The same run in one call of the compiled transformer of `fast`."""
        scheduler, conditioning = fast.scheduler, self.pipeline.conditioning(self.wanted, self.guidance)
        scheduler.set_timesteps(self.steps)
        return lambda: fast.transformer.trajectory(self.noise, scheduler, self.guidance, **conditioning)

    def calls(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Random samples for the denoiser calls of a run, with guidance, and the calls' other arguments."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.steps, 2 * self.batch, *self.noise.shape[1:])
        samples = torch.randn(shape, generator=generator).to(self.machine.device, self.dtype)
        return list(samples), self.pipeline.conditioning(self.wanted, self.guidance)

    def step(
        self, pipeline: PixelPipeline, steps: int | None = None, stream: Callable[[], Any] = contextlib.nullcontext
    ) -> list[Tensor]:
        """The outputs of a run's denoiser calls, or of the first so many; samples do not depend on them.

        Args:
            stream: makes a context for each call.
        """
        samples, conditioning = self.calls()
        pipeline.scheduler.set_timesteps(self.steps)
        timesteps = pipeline.scheduler.timesteps.to(self.machine.device)
        self.machine.synchronize()
        outputs = []
        for i, sample in enumerate(samples[:steps]):
            with stream(), torch.no_grad():
                now = timesteps[i].expand(len(sample))
                outputs.append(pipeline.transformer(sample, timestep=now, **conditioning).sample)
        self.machine.synchronize()
        return outputs


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value expected; NaN where either has one."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()
