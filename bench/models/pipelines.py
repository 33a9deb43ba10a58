"""Pipelines around a transformer alone: labels or prompts in, pixels out. What all have in common, DiT's, PixArt's.

Calls are those of diffusers' `DiTPipeline` and `PixArtAlphaPipeline`, as far as they go without a VAE.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PixArtTransformer2DModel, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .prompts import PromptFeatures

EMOJI = Path(__file__).parent / "pixart-emoji"
OnStepEnd = Callable[[DiffusionPipeline, int, int, dict[str, Tensor]], dict[str, Tensor]]


class PixelPipeline(DiffusionPipeline):
    """What a bench asks of any model's pipeline.

    A call takes labels or prompts, guidance, and `latents`, noise of `shape` an image, and returns pixels;
    ``output_type="latent"`` leaves them as sampled, around [-1, 1].
    """

    reference: str | None = None  # name of the reference model it samples
    prompts: PromptFeatures | None = None  # what it knows, where it reads text
    batched_guidance = True  # both halves in one call of the model; else one each, in cache contexts
    steps: int | None = None  # steps of a run, where whoever prepared it wants others than asked for

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample."""
        config = self.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def known(self) -> Sequence[Any]:
        """Everything an image may be asked to show: labels or prompts."""
        return self.prompts.names

    @property
    def context(self) -> int | None:
        """Tokens of a prompt."""
        return None if self.prompts is None else self.prompts.states.shape[1]

    def examples(self, count: int) -> list[Any]:
        """What `count` images are to show, from all over `known`."""
        known = self.known
        return [known[i * len(known) // count] if count <= len(known) else known[i % len(known)] for i in range(count)]

    @staticmethod
    def each(prompt: str | list[str], images: int) -> list[str]:
        """What every image is to show, `images` a prompt, those of a prompt one after another."""
        return [name for name in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(images)]

    def noise(self, images: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """A call's `latents` unless it is given any."""
        return randn_tensor((images, *self.shape), generator, self._execution_device, self.transformer.dtype)

    def timesteps(self, steps: int) -> list[float]:
        """Those a call of `steps` steps goes through."""
        self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps.tolist()

    def pictures(self, states: Tensor) -> Tensor:
        """What the transformer reads as `hidden_states`, as samples [n, channels, height, width]."""
        return states

    def around(self, denoiser: nn.Module) -> PixelPipeline:
        """A quiet pipeline of its own around `denoiser`, with a scheduler of its own."""
        own = self._again(self.scheduler.from_config(self.scheduler.config))
        own.reference = self.reference
        own.set_progress_bar_config(disable=True)
        object.__setattr__(own, "transformer", denoiser)
        return own

    def _again(self, scheduler: SchedulerMixin) -> PixelPipeline:
        """A pipeline of the same parts, but for the scheduler."""
        raise NotImplementedError


class LoopPipeline(PixelPipeline):
    """The sampling loop of diffusers' DiT and PixArt pipelines, whatever images are conditioned on."""

    model_cpu_offload_seq = "transformer"
    _interrupt = False

    def conditioning(self, wanted: list[Any], guidance_scale: float) -> dict[str, Any]:
        """The transformer's arguments besides sample and timestep for such images, doubled where there is guidance."""
        raise NotImplementedError

    def _sample(
        self,
        arguments: dict[str, Any],
        images: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        num_inference_steps: int,
        output_type: str,
        return_dict: bool,
        latents: Tensor | None,
        callback_on_step_end: OnStepEnd | None,
    ) -> ImagePipelineOutput | tuple:
        """`arguments`: the transformer's, for all samples; with guidance conditional ones first."""
        config = self.transformer.config
        x = self.noise(images, generator) if latents is None else latents
        guided, self._interrupt = guidance_scale > 1, False
        self.scheduler.set_timesteps(num_inference_steps)
        draws = "generator" in inspect.signature(self.scheduler.step).parameters
        drawing = {"generator": generator} if draws else {}
        learned_variance = str(self.scheduler.config.get("variance_type", "")).startswith("learned")  # IDDPM
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        timesteps = self.scheduler.timesteps.to(x.device)  # at once: a copy a step would have the host wait at each
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self._interrupt:
                continue
            model_input = torch.cat([x, x]) if guided else x
            if hasattr(self.scheduler, "scale_model_input"):  # flow matching's has none
                model_input = self.scheduler.scale_model_input(model_input, t)
            output = self.transformer(model_input, timestep=timesteps[i].expand(len(model_input)), **arguments).sample
            noise = output[:, : config.in_channels]
            if guided:
                conditional, unconditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            if learned_variance:
                noise = torch.cat([noise, output[:images, config.in_channels :]], dim=1)
            x = self.scheduler.step(noise, t, x, return_dict=False, **drawing)[0]
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, i, t, {"latents": x}).pop("latents", x)
        result: object = x
        if output_type != "latent":
            result = (x / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                result = result.cpu().permute(0, 2, 3, 1).float().numpy()
                if output_type == "pil":
                    result = self.numpy_to_pil(result)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)


class PixelDiTPipeline(LoopPipeline):
    """Class-conditional sampling of a DiT."""

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @property
    def known(self) -> range:
        return range(self.transformer.config.num_embeds_ada_norm)

    def examples(self, count: int) -> list[int]:
        """Every class in turn."""
        return [i % len(self.known) for i in range(count)]

    def _again(self, scheduler: SchedulerMixin) -> PixelDiTPipeline:
        return type(self)(self.transformer, scheduler)

    def conditioning(self, wanted: list[int], guidance_scale: float) -> dict[str, Any]:
        labels = torch.tensor(wanted, device=self._execution_device)
        if guidance_scale > 1:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)])
        return {"class_labels": labels}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image a label.

        Args:
            class_labels: one an image, from 0; the model's null label is added for guidance.
            guidance_scale: classifier-free guidance; off unless above 1.
            output_type: ``"pil"``, ``"np"`` ([batch, height, width, channels] in [0, 1]) or ``"pt"``
                ([batch, channels, height, width] in [0, 1]), or ``"latent"``: pixels as sampled, around [-1, 1].
            latents: initial noise [batch, channels, height, width]; drawn from `generator` unless given.
            callback_on_step_end: (pipeline, step, timestep, {"latents"}) -> {"latents"} after each step; it may set
                ``pipeline._interrupt``.
        """
        arguments = self.conditioning(class_labels, guidance_scale)
        rest = (generator, num_inference_steps, output_type, return_dict, latents, callback_on_step_end)
        return self._sample(arguments, len(class_labels), guidance_scale, *rest)


class PixelPixArtPipeline(LoopPipeline):
    """Text-to-image sampling of a PixArt.

    Args:
        prompts: features of the prompts it knows; pixart-emoji's unless given.
    """

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        scheduler: SchedulerMixin,
        prompts: PromptFeatures | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.sized = transformer.use_additional_conditions  # it is told resolution and aspect ratio
        self.prompts = PromptFeatures.load(EMOJI) if prompts is None else prompts

    def _again(self, scheduler: SchedulerMixin) -> PixelPixArtPipeline:
        return type(self)(self.transformer, scheduler, self.prompts)

    def conditioning(self, wanted: list[str], guidance_scale: float) -> dict[str, Any]:
        model, images = self.transformer, len(wanted)
        on = {"device": model.device, "dtype": model.dtype}  # a pipeline's own word on its device takes thrice as long
        states, mask = self.prompts(wanted)
        if guidance_scale > 1:
            empty, empty_mask = self.prompts([""] * images)
            states, mask = torch.cat([states, empty]), torch.cat([mask, empty_mask])
        arguments = {
            "encoder_hidden_states": states.to(**on),
            "encoder_attention_mask": mask.to(on["device"]),
        }
        if self.sized:
            side = 8.0 * model.config.sample_size  # pixels of a latent's side
            sizes = {"resolution": [side, side], "aspect_ratio": [1.0]}
            arguments["added_cond_kwargs"] = {k: torch.tensor([v] * len(states), **on) for k, v in sizes.items()}
        return arguments

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Sample `num_images_per_prompt` images a prompt, those of a prompt one after another.

        Other arguments are `PixelDiTPipeline`'s.

        Raises:
            ValueError: a prompt that is not stored, where the text encoder is not installed.
        """
        each = self.each(prompt, num_images_per_prompt)
        arguments = self.conditioning(each, guidance_scale)
        rest = (generator, num_inference_steps, output_type, return_dict, latents, callback_on_step_end)
        return self._sample(arguments, len(each), guidance_scale, *rest)
