"""diffusers' own FluxPipeline on pixels: features of known prompts in, pictures out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, FluxPipeline, FluxTransformer2DModel, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from torch import Tensor

from .pipelines import OnStepEnd, PixelPipeline
from .prompts import PromptFeatures


class PixelVae(ModelMixin, ConfigMixin):
    """Stands where FluxPipeline has an autoencoder: latents are squares of 2x2 pixels.

    Args:
        sample_size: side of a picture, in pixels.
        latent_channels: four times a picture's.
        block_out_channels: their number tells the pipeline that a latent is half as wide as a picture.
        scaling_factor, shift_factor: what the pipeline divides latents by, and then adds.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        latent_channels: int = 12,
        block_out_channels: tuple[int, ...] = (3, 12),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(()), persistent=False)  # pipelines ask for its device

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [n, channels * 4, height / 2, width / 2] of pixels [n, channels, height, width]."""
        return F.pixel_unshuffle(pixels, 2)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The inverse, in a tuple."""
        return (F.pixel_shuffle(latents, 2),)


class PixelFluxPipeline(PixelPipeline, FluxPipeline):
    """Text-to-image sampling of a Flux: FluxPipeline's own call, guidance in a second call of the model a step."""

    batched_guidance = False
    sigmas: list[float] | None = None  # noise levels of its runs, where whoever prepared it wants others than even ones

    @classmethod
    def of(
        cls, transformer: FluxTransformer2DModel, scheduler: SchedulerMixin, prompts: PromptFeatures
    ) -> PixelFluxPipeline:
        """Around a transformer alone; `prompts` stand for tokenizers and text encoders."""
        own = cls(scheduler, PixelVae(), None, None, None, None, transformer)
        own.prompts = prompts
        return own

    def _again(self, scheduler: SchedulerMixin) -> PixelFluxPipeline:
        return self.of(self.transformer, scheduler, self.prompts)

    @property
    def shape(self) -> tuple[int, int, int]:
        config = self.vae.config
        return (config.latent_channels // 4, config.sample_size, config.sample_size)

    def timesteps(self, steps: int) -> list[float]:
        """FluxPipeline's: it gives the scheduler its noise levels."""
        if self.sigmas is not None:
            self.scheduler.set_timesteps(sigmas=self.sigmas)
            return self.scheduler.timesteps.tolist()
        own = self.scheduler.config.get("use_flow_sigmas", False)
        levels = {"num_inference_steps": steps} if own else {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        self.scheduler.set_timesteps(**levels)
        return self.scheduler.timesteps.tolist()

    def features(self, wanted: list[str]) -> tuple[Tensor, Tensor]:
        """States [n, tokens, features], 0 where they do not count, and the mean of those that do, [n, features]."""
        states, mask = self.prompts(wanted)
        mask = mask.to(states.dtype)[..., None]
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        on = (self.transformer.device, self.transformer.dtype)  # a pipeline's own device takes thrice as long
        return (states * mask).to(*on), pooled.to(*on)

    def packed(self, pixels: Tensor) -> Tensor:
        """What the transformer reads, [n, tokens, channels], of pixels [n, channels, height, width]."""
        latents = self.vae.encode(pixels)
        return self._pack_latents(latents, *latents.shape)

    def pictures(self, states: Tensor) -> Tensor:
        _, height, width = self.shape
        return self.vae.decode(self._unpack_latents(states, height, width, self.vae_scale_factor))[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 20,
        sigmas: list[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> FluxPipelineOutput | tuple:
        """Sample `num_images_per_prompt` images a prompt, as `PixelPixArtPipeline` does.

        Args:
            guidance_scale: FluxPipeline's `true_cfg_scale`; off unless above 1.
            sigmas: noise levels of the steps; the pipeline's own `sigmas` unless given.
            latents: initial noise, shaped as pixels.
            callback_on_step_end: its latents are packed.

        Raises:
            ValueError: a prompt that is not stored, where the text encoder is not installed.
        """
        each = self.each(prompt, num_images_per_prompt)
        (states, pooled), (_, height, width) = self.features(each), self.shape
        call: dict[str, Any] = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
        if guidance_scale > 1:
            empty, empty_pooled = self.features([""] * len(each))
            call |= {"negative_prompt_embeds": empty, "negative_pooled_prompt_embeds": empty_pooled}
        if latents is None:
            latents = self.noise(len(each), generator)
        images = FluxPipeline.__call__.__wrapped__(  # gradients are off here, unless one wants them
            self,
            **call,
            true_cfg_scale=guidance_scale,
            guidance_scale=1.0,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=self.sigmas if sigmas is None else sigmas,
            latents=self.packed(latents),
            output_type=output_type,
            return_dict=False,
            callback_on_step_end=callback_on_step_end,
        )[0]
        if output_type == "latent":
            images = self.pictures(images)
        return FluxPipelineOutput(images=images) if return_dict else (images,)
