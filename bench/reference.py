"""The models the benchmarks run, behind one pipeline: class labels in, pixels (or latents) out, no VAE.

``dit-fashion`` was trained for this project; ``dit-s-2`` and ``dit-xl-2`` are the published architectures at 256 px
with random weights, good for timings only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

FASHION = Path(__file__).parent / "models" / "dit-fashion"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
GUIDANCE = 1.5


class PixelDiTPipeline(DiffusionPipeline):
    """Class-conditional sampling of a DiT without a VAE; the call is `DiTPipeline`'s."""

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
            class_labels: one an image, from 0; the model's null label is added for guidance.
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
            ).sample[:, : config.in_channels]  # learned variances, if any, are not used
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


@dataclass(frozen=True)
class Reference:
    """How to make a model: the trained one has no config; `size` is the side of its input."""

    config: dict[str, int] | None
    classes: int
    size: int

    @property
    def trained(self) -> bool:
        return self.config is None


def _published(layers: int, heads: int, head_dim: int) -> Reference:
    config = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    return Reference(config, classes=1000, size=32)


REFERENCES = {
    "dit-fashion": Reference(None, classes=10, size=28),
    "dit-s-2": _published(layers=12, heads=6, head_dim=64),
    "dit-xl-2": _published(layers=28, heads=16, head_dim=72),
}


def load_pipeline(name: str, layers: int | None = None, size: int | None = None) -> PixelDiTPipeline:
    """A quiet fp32 pipeline of one of `REFERENCES`, with DDIM on linear betas as dit-fashion was trained.

    Args:
        layers, size: shrink a published architecture (not dit-fashion) so that a CPU can finish.
    """
    reference = REFERENCES[name]
    if reference.trained:
        if layers is not None or size is not None:
            raise ValueError(f"{name} is trained: expected no other layers or size, got {layers} and {size}")
        transformer = DiTTransformer2DModel.from_pretrained(FASHION, variant="fp16", torch_dtype=torch.float32)
    else:
        torch.manual_seed(0)
        config = {**reference.config, "sample_size": size or reference.size}
        if config["sample_size"] % 2:
            raise ValueError(f"{name}: expected a size that is a multiple of the patch, 2, got {size}")
        if layers is not None:
            config["num_layers"] = layers
        transformer = DiTTransformer2DModel(
            in_channels=4, out_channels=8, patch_size=2, num_embeds_ada_norm=1000, **config
        ).eval()
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipeline = PixelDiTPipeline(transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(pipeline: PixelDiTPipeline, count: int, seed: int = 0) -> Tensor:
    """Initial noise for `count` images."""
    config = pipeline.transformer.config
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.in_channels, config.sample_size, config.sample_size, generator=generator)


def labels(name: str, count: int) -> list[int]:
    """Class labels for `count` images: every class in turn."""
    return [i % REFERENCES[name].classes for i in range(count)]


def timesteps(pipeline: PixelDiTPipeline, steps: int) -> list[int]:
    pipeline.scheduler.set_timesteps(steps)
    return pipeline.scheduler.timesteps.tolist()
