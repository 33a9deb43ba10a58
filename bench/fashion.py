"""The reference model dit-fashion and a pipeline for it: pixels, class labels, no VAE."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

FOLDER = Path(__file__).parent / "models" / "dit-fashion"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
GUIDANCE = 1.5


class FashionPipeline(DiffusionPipeline):
    """Class-conditional sampling in pixel space; the call is `DiTPipeline`'s."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = GUIDANCE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image a label.

        Args:
            class_labels: 0 to 9.
            guidance_scale: classifier-free guidance; off unless above 1.
            output_type: ``"pil"``, ``"np"`` ([batch, height, width, channels] in [0, 1]) or ``"pt"``
                ([batch, channels, height, width] in [0, 1]), or ``"latent"``: pixels as sampled, around [-1, 1].
            latents: initial noise [batch, channels, height, width]; drawn from `generator` unless given.
        """
        config, device = self.transformer.config, self._execution_device
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        x = randn_tensor(shape, generator, device, self.transformer.dtype) if latents is None else latents
        labels = torch.tensor(class_labels, device=device)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
        self.scheduler.set_timesteps(num_inference_steps)
        x = x * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            noise = self.transformer(
                model_input, timestep=t.to(device).expand(len(model_input)), class_labels=labels
            ).sample
            if guided:
                conditional, unconditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            x = self.scheduler.step(noise, t, x, return_dict=False)[0]
        images: object = x
        if output_type != "latent":
            images = (x / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                images = images.cpu().permute(0, 2, 3, 1).float().numpy()
                if output_type == "pil":
                    images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def load_fashion(dtype: torch.dtype = torch.float32) -> FashionPipeline:
    """The reference pipeline, as trained: DDIM on linear betas, noise prediction. Quiet."""
    transformer = DiTTransformer2DModel.from_pretrained(FOLDER, variant="fp16", torch_dtype=dtype)
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipeline = FashionPipeline(transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
