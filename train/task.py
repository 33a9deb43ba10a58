"""What a schedule is learned for: a frozen model, a sampler, guidance; and one run of that sampler, step by step."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harmonica_rt.loop import guide, learns_variance

from .denoiser import Denoiser, StandIn

# (count, generator) -> conditional and unconditional tensors, [count, ...] each, as `Inputs.conditioning` has them
Conditions = Callable[[int, torch.Generator], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Batch:
    """Where runs start: noise [count, channels, height, width] and what the images are to be.

    Attributes:
        conditional, unconditional: `Inputs.conditioning`; tensors whose first dimension is `count`.
        seeds: of the noise that a stochastic sampler adds, the same for every run from this start.
    """

    noise: Tensor
    conditional: tuple[Tensor, ...]
    unconditional: tuple[Tensor, ...]
    seeds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.noise)

    def part(self, start: int, end: int) -> Batch:
        conditional, unconditional = (
            tuple(t[start:end] for t in group) for group in (self.conditional, self.unconditional)
        )
        return Batch(self.noise[start:end], conditional, unconditional, self.seeds[start:end])


class Task:
    """A frozen model with the sampler its schedule is learned for. Image-free: batches are noise and conditions.

    Args:
        model: a supported diffusers model in eval mode. Its parameters stop requiring gradients.
        scheduler: a diffusers scheduler; copied for each run, never changed.
        steps: T, calls of the denoiser a run.
        guidance_scale: classifier-free guidance; off unless above 1.
        conditions: draws what images are to be; random class labels unless given, which a model of text has not.
        checkpointing: as in `Denoiser`.

    Attributes:
        context: tokens of a prompt; None for a model that reads none.
    """

    def __init__(
        self,
        model: Any,
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
        self.denoiser = Denoiser.of(model, checkpointing)
        self.adapter = self.denoiser.adapter
        self.scheduler = copy.deepcopy(scheduler)
        self.scheduler.set_timesteps(steps)
        if len(self.scheduler.timesteps) != steps:
            raise ValueError(
                f"{type(scheduler).__name__}: expected {steps} timesteps, one a call, "
                f"got {len(self.scheduler.timesteps)}"
            )
        if conditions is None and self.adapter.contexts:
            raise ValueError(f"conditions: expected some for {self.adapter.model_class}, which reads text; got none")
        self.conditions = conditions or class_labels(model)
        self.context = self.adapter.context_tokens(self.conditions(1, torch.Generator())[0]) or None
        self.learned_variance = learns_variance(self.scheduler)
        if self.learned_variance and self.adapter.out_channels != 2 * self.adapter.in_channels:
            raise ValueError(
                f"{type(scheduler).__name__} with {self.scheduler.config.variance_type}: expected a model with "
                f"{2 * self.adapter.in_channels} output channels, got {self.adapter.out_channels}"
            )

    def parameters(self) -> dict[str, Tensor]:
        """Of what is learned for, by name."""
        return dict(self.model.named_parameters())

    def asked(self) -> dict[str, Any]:
        """What images are to be, for whoever goes on: some draws of it."""
        return {"conditions": self.conditions(8, torch.Generator().manual_seed(0))}

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
        conditional, unconditional = (
            tuple(t.to(self.device) for t in group) for group in self.conditions(count, generator)
        )
        seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        return Batch(noise.to(self.device, self.model.dtype), conditional, unconditional, tuple(seeds))

    def conditioning(self, batch: Batch) -> tuple[Tensor, ...]:
        """Of all samples of a call: with guidance conditional ones first."""
        if not self.guided:
            return batch.conditional
        return tuple(map(torch.cat, zip(batch.conditional, batch.unconditional)))

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
        raise ValueError(f"classes: expected some from 0 to {classes - 1}, got {chosen.tolist()}")

    def draw(count: int, generator: torch.Generator) -> tuple[tuple[Tensor], tuple[Tensor]]:
        labels = chosen[torch.randint(0, len(chosen), (count,), generator=generator)]
        return (labels,), (torch.full_like(labels, classes),)

    return draw


def prompts(model: Any, states: Tensor, mask: Tensor) -> Conditions:
    """Uniform draws of prompts, all but the last; the last is the empty one, of unconditional samples.

    Args:
        model: that reads text; one that takes resolution and aspect ratio is told those of its own size.
        states: [n + 1, tokens, features], text features.
        mask: [n + 1, tokens], 1 for tokens that count.
    """
    config = model.config
    width = config.caption_channels or config.cross_attention_dim
    if states.ndim != 3 or len(states) < 2 or states.shape[2] != width or mask.shape != states.shape[:2]:
        raise ValueError(
            f"features: expected states [2 or more, tokens, {width}] and mask [2 or more, tokens], got "
            f"{list(states.shape)} and {list(mask.shape)}"
        )
    states, side = states.to(model.dtype), 8.0 * config.sample_size  # pixels of a latent's side

    def group(at: Tensor) -> tuple[Tensor, ...]:
        sizes: tuple[Tensor, ...] = ()
        if model.use_additional_conditions:
            sizes = (torch.full((len(at), 2), side).to(states), torch.ones(len(at), 1).to(states))
        return (*sizes, states[at], mask[at])

    def draw(count: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        chosen = torch.randint(0, len(states) - 1, (count,), generator=generator)
        return group(chosen), group(torch.full_like(chosen, len(states) - 1))

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
        conditioning = task.conditioning(batch)
        timesteps = self.scheduler.timesteps.to(task.device)
        self.rows = task.denoiser.modulation(timesteps, conditioning, batch.noise.dtype)
        self.held = task.denoiser.encode(
            conditioning, torch.cat([batch.noise, batch.noise]) if task.guided else batch.noise
        )
        self.x = batch.noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching's has none
        self.drawing = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters and batch.seeds:
            self.drawing["generator"] = [torch.Generator().manual_seed(seed) for seed in batch.seeds]

    def fork(self) -> Trajectory:
        """The same run from here on, on its own."""
        other = copy.copy(self)
        other.scheduler = copy.deepcopy(self.scheduler)
        other.drawing = {name: [g.clone_state() for g in states] for name, states in self.drawing.items()}
        return other

    @property
    def done(self) -> bool:
        return self.step == self.task.steps

    def denoise(self, stand_in: StandIn) -> Tensor:
        """The model's output after guidance, [count, channels, height, width]."""
        sample = self.model_input()
        sample = torch.cat([sample, sample]) if self.task.guided else sample
        output = self.task.denoiser(sample, self.rows[self.step], stand_in, self.held)
        return guide(output, self.task.guidance_scale, self.x.shape[1], self.task.learned_variance)

    def model_input(self) -> Tensor:
        """x as the sampler scales it for the model."""
        if not hasattr(self.scheduler, "scale_model_input"):  # flow matching's does not
            return self.x
        return self.scheduler.scale_model_input(self.x, self.scheduler.timesteps[self.step])

    def advance(self, output: Tensor) -> None:
        """The sampler's update with the guided output."""
        t = self.scheduler.timesteps[self.step]
        self.x = self.scheduler.step(output, t, self.x, return_dict=False, **self.drawing)[0]
        self.step += 1
