"""Pipelines of the sizes that people run, with random weights, on the card: prompts are random features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from .machine import Machine


@dataclass(frozen=True)
class Parts:
    """A pipeline without text encoders and VAE.

    Attributes:
        name: as tables show it.
        pipeline, denoiser: diffusers' classes.
        config: of the denoiser, where it differs from the class's defaults, which are the published model's.
        call: arguments that are not tensors.
        features: of one prompt, by the call's argument: shape behind the batch.
    """

    name: str
    pipeline: str
    denoiser: str
    config: dict[str, Any]
    call: dict[str, Any]
    features: dict[str, tuple[int, ...]]
    shift: float | None = None

    def make(self, machine: Machine) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and the arguments of its call for one image, steps but not the noise among them."""
        dtype = torch.float32 if machine.dry else torch.bfloat16
        kind, parts = getattr(diffusers, self.pipeline), {}
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(machine.device):
                model = getattr(diffusers, self.denoiser)(**self.config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        options = {} if self.shift is None else {"shift": self.shift}
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        absent = [name for name in kind.__init__.__annotations__ if name not in ("transformer", "scheduler", "return")]
        parts |= {n: None for n in absent if n.startswith(("vae", "text_encoder", "tokenizer", "image_enc", "feature"))}
        pipeline = kind(transformer=model, **parts)
        pipeline.set_progress_bar_config(disable=True)
        features = {
            name: torch.randn(1, *shape, dtype=dtype, device=machine.device) for name, shape in self.features.items()
        }
        return pipeline, {**self.call, **features}


def run_of(pipeline: Any, call: dict[str, Any]) -> Callable[[], Any]:
    """One run to latents."""
    return lambda: pipeline(
        **call, generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False
    )[0]


FLUX_TEXT = {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}
FLUX = Parts(
    "Flux.1-dev 1024",
    "FluxPipeline",
    "FluxTransformer2DModel",
    {"guidance_embeds": True},
    {"height": 1024, "width": 1024, "num_inference_steps": 20, "guidance_scale": 3.5},
    FLUX_TEXT,
    shift=3.0,
)
WIDE = Parts(
    "Flux, 12 layers of 1024, 512 px",
    "FluxPipeline",
    "FluxTransformer2DModel",
    {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8, "guidance_embeds": True},
    {"height": 512, "width": 512, "num_inference_steps": 20, "guidance_scale": 3.5},
    FLUX_TEXT,
    shift=3.0,
)
EMOJI = Parts(
    "flux-emoji's size",
    "FluxPipeline",
    "FluxTransformer2DModel",
    {
        "patch_size": 1, "in_channels": 48, "num_layers": 4, "num_single_layers": 6, "attention_head_dim": 32,
        "num_attention_heads": 4, "joint_attention_dim": 384, "pooled_projection_dim": 384, "guidance_embeds": False,
        "axes_dims_rope": (8, 12, 12),
    },
    {"height": 256, "width": 256, "num_inference_steps": 20, "true_cfg_scale": 4.0},
    {
        "prompt_embeds": (16, 384), "pooled_prompt_embeds": (384,),
        "negative_prompt_embeds": (16, 384), "negative_pooled_prompt_embeds": (384,),
    },
    shift=3.0,
)  # fmt: skip
WAN = Parts(
    "Wan 2.1 1.3B, 832x480, 81 frames",
    "WanPipeline",
    "WanTransformer3DModel",
    {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 9, "guidance_scale": 5.0},
    {"prompt_embeds": (512, 4096), "negative_prompt_embeds": (512, 4096)},
    shift=3.0,
)
TINY = Parts(
    "Flux, 2 layers",
    "FluxPipeline",
    "FluxTransformer2DModel",
    {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
    },
    {"height": 32, "width": 32, "num_inference_steps": 6},
    {"prompt_embeds": (4, 8), "pooled_prompt_embeds": (8,)},
)  # fmt: skip
