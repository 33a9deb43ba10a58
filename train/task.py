"""What a schedule is learned for: a frozen model, a sampler, guidance; and one run of that sampler, step by step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harmonica_rt.loop import guide

from .denoiser import Denoiser, StandIn

# (count, generator) -> conditional and unconditional tensors of modulation, [count, ...] each
Conditions = Callable[[int, torch.Generator], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Batch:
    """Where runs start: noise [count, channels, height, width] and what the images are to be.

    Attributes:
        conditional, unconditional: what modulation depends on; tensors whose first dimension is `count`.
    """

    noise: Tensor
    conditional: tuple[Tensor, ...]
    unconditional: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.noise)

    def part(self, start: int, end: int) -> Batch:
        cut = [tuple(t[start:end] for t in group) for group in (self.conditional, self.unconditional)]
        return Batch(self.noise[start:end], *cut)


class Task:
    """A frozen model with the sampler its schedule is learned for. Image-free: batches are noise and conditions.

    Args:
        model: a supported diffusers model in eval mode. Its parameters stop requiring gradients.
        scheduler: a diffusers scheduler; copied for each run, never changed.
        steps: T, calls of the denoiser a run.
        guidance_scale: classifier-free guidance; off unless above 1.
        conditions: draws conditions; random class labels unless given.
        checkpointing: as in `Denoiser`.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        steps: int,
        guidance_scale: float = 1.5,
        conditions: Conditions | None = None,
        checkpointing: bool = False,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise ValueError(f"steps: expected an integer of at least 2, got {steps!r}")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: expected a finite number, got {guidance_scale}")
        self.model, self.steps, self.guidance_scale = model, steps, float(guidance_scale)
        self.denoiser = Denoiser(model, checkpointing)
        self.adapter = self.denoiser.adapter
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(steps)
        if len(self.scheduler.timesteps) != steps:
            raise ValueError(
                f"{type(scheduler).__name__}: expected {steps} timesteps, one a call, "
                f"got {len(self.scheduler.timesteps)}"
            )
        self.conditions = conditions or class_labels(model)

    def with_sampler(self, scheduler: Any, steps: int) -> Task:
        """The same model, guidance and conditions with another sampler."""
        return Task(self.model, scheduler, steps, self.guidance_scale, self.conditions, self.denoiser.checkpointing)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def device(self) -> torch.device:
        return self.model.device

    def draw(self, count: int, seed: int) -> Batch:
        """`count` starts that depend on the seed alone, not on how many processes share them."""
        generator = torch.Generator().manual_seed(seed)
        size, config = self.model.config.sample_size, self.model.config
        noise = torch.randn(count, config.in_channels, size, size, generator=generator, dtype=torch.float32)
        groups = self.conditions(count, generator)
        on = [tuple(t.to(self.device) for t in group) for group in groups]
        return Batch(noise.to(self.device, self.model.dtype), *on)

    def fields(self) -> dict[str, Any]:
        """What a `Schedule` for this task says of it."""
        return {
            "model": self.adapter.model_class,
            "branches": self.adapter.branches,
            "sampler": type(self.scheduler).__name__,
            "timesteps": self.scheduler.timesteps.tolist(),
            "guidance_scale": self.guidance_scale,
        }


def class_labels(model: nn.Module, only: Sequence[int] | None = None) -> Conditions:
    """Uniform class labels, of all or `only` some, and the model's null label."""
    if (classes := getattr(model.config, "num_embeds_ada_norm", None)) is None:
        raise ValueError(f"conditions: expected some for {type(model).__name__}, which has no class labels; got none")
    chosen = torch.arange(classes) if only is None else torch.tensor(only)
    if not len(chosen) or not 0 <= chosen.min() <= chosen.max() < classes:
        raise ValueError(f"classes: expected some from 0 to {classes - 1}, got {list(only)}")

    def draw(count: int, generator: torch.Generator) -> tuple[tuple[Tensor], tuple[Tensor]]:
        labels = chosen[torch.randint(0, len(chosen), (count,), generator=generator)]
        return (labels,), (torch.full_like(labels, classes),)

    return draw


class Trajectory:
    """One run of the sampler for a batch: `denoise`, then `advance`, for each step.

    Attributes:
        step: the step that comes next.
        x: the sample it starts from.
    """

    def __init__(self, task: Task, batch: Batch, first: int = 0) -> None:
        self.task, self.step = task, first
        self.scheduler = copy.deepcopy(task.scheduler)
        conditioning = tuple(map(torch.cat, zip(batch.conditional, batch.unconditional)))
        timesteps = self.scheduler.timesteps.to(task.device)
        self.rows = task.denoiser.modulation(
            timesteps, conditioning if task.guided else batch.conditional, batch.noise.dtype
        )
        self.x = batch.noise * self.scheduler.init_noise_sigma

    def fork(self) -> Trajectory:
        """The same run from here on, on its own."""
        other = copy.copy(self)
        other.scheduler = copy.deepcopy(self.scheduler)
        return other

    @property
    def done(self) -> bool:
        return self.step == self.task.steps

    def denoise(self, stand_in: StandIn) -> Tensor:
        """The model's output after guidance, [count, channels, height, width]."""
        return self.output(self.step, self.model_input(), stand_in)

    def model_input(self) -> Tensor:
        """x as the sampler scales it for the model."""
        return self.scheduler.scale_model_input(self.x, self.scheduler.timesteps[self.step])

    def output(self, step: int, x: Tensor, stand_in: StandIn) -> Tensor:
        """`denoise` of a step as a function of its arguments alone, so that it can be run again."""
        sample = torch.cat([x, x]) if self.task.guided else x
        return guide(self.task.denoiser(sample, self.rows[step], stand_in), self.task.guidance_scale, x.shape[1])

    def advance(self, output: Tensor) -> None:
        """The sampler's update with the guided output."""
        t = self.scheduler.timesteps[self.step]
        self.x = self.scheduler.step(output, t, self.x, return_dict=False)[0]
        self.step += 1
