"""The models the benchmarks run, by name.

``dit-fashion``, ``pixart-emoji`` and ``flux-emoji`` were trained for this project; the others are published
architectures with random weights, good for timings only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
)
from torch import Tensor

from .flux_pipeline import PixelFluxPipeline
from .pipelines import PixelDiTPipeline, PixelPipeline, PixelPixArtPipeline
from .prompts import PromptFeatures

MODELS = Path(__file__).parent
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # as DiT and PixArt were trained
TRANSFORMERS = {"dit": DiTTransformer2DModel, "pixart": PixArtTransformer2DModel, "flux": FluxTransformer2DModel}


@dataclass(frozen=True)
class Reference:
    """How to make a model.

    Attributes:
        kind: a key of `TRANSFORMERS`.
        config: the architecture's; None for a trained model.
        size: side of its input.
        guidance: classifier-free guidance it is sampled with.
        text: tokens of a prompt.
        prompts: whose prompts a trained one reads; its own unless given.
    """

    kind: str
    config: dict[str, Any] | None
    size: int
    guidance: float
    text: int = 0
    prompts: str | None = None

    @property
    def trained(self) -> bool:
        return self.config is None


def _dit(layers: int, heads: int, head_dim: int) -> Reference:
    config = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    fixed = {"in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000}
    return Reference("dit", {**fixed, **config}, size=32, guidance=1.5)


def _pixart(size: int, text: int = 120, **config: Any) -> Reference:
    """XL/2, the architecture of all published PixArts; diffusers' defaults are its other numbers."""
    return Reference("pixart", {"caption_channels": 4096, **config}, size, guidance=4.5, text=text)


REFERENCES = {
    "dit-fashion": Reference("dit", None, size=28, guidance=1.5),
    "dit-s-2": _dit(layers=12, heads=6, head_dim=64),
    "dit-xl-2": _dit(layers=28, heads=16, head_dim=72),
    "pixart-emoji": Reference("pixart", None, size=32, guidance=4.5),
    "flux-emoji": Reference("flux", None, size=32, guidance=4.0, prompts="pixart-emoji"),
    "pixart-alpha-256": _pixart(32),
    "pixart-alpha-512": _pixart(64),
    "pixart-alpha-1024": _pixart(128),
    "pixart-sigma-1024": _pixart(128, text=300, use_additional_conditions=False),
    "pixart-sigma-2k": _pixart(256, text=300),
}
TRAINED = [name for name, reference in REFERENCES.items() if reference.trained]


def load_pipeline(
    name: str, layers: int | None = None, size: int | None = None, device: torch.device | str = "cpu"
) -> PixelPipeline:
    """A quiet fp32 pipeline of one of `REFERENCES`.

    A DiT's sampler is DDIM and a PixArt's DPM-Solver++, both on linear betas; a Flux's is Euler's of flow matching.

    Args:
        layers, size: shrink a published architecture (no trained one) so that a CPU can finish.
        device: where it is; random weights are drawn there.
    """
    reference = REFERENCES[name]
    kind = TRANSFORMERS[reference.kind]
    if reference.trained:
        if layers is not None or size is not None:
            raise ValueError(f"{name} is trained: expected no other layers or size, got {layers} and {size}")
        transformer = kind.from_pretrained(MODELS / name, variant="fp16", torch_dtype=torch.float32).to(device)
    else:
        torch.manual_seed(0)
        config = {**reference.config, "sample_size": size or reference.size}
        if config["sample_size"] % 2:
            raise ValueError(f"{name}: expected a size that is a multiple of the patch, 2, got {size}")
        if layers is not None:
            config["num_layers"] = layers
        with torch.device(device):
            transformer = kind(**config).eval()
    if reference.kind == "dit":
        pipeline: PixelPipeline = PixelDiTPipeline(transformer, DDIMScheduler(clip_sample=False, **LINEAR))
    elif reference.kind == "flux":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        pipeline = PixelFluxPipeline.of(transformer, scheduler, prompt_features(name))
    else:
        pipeline = PixelPixArtPipeline(transformer, DPMSolverMultistepScheduler(**LINEAR), prompt_features(name))
    pipeline.reference = name
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt_features(name: str) -> PromptFeatures:
    """What a text-to-image reference reads."""
    reference = REFERENCES[name]
    if reference.trained:
        return PromptFeatures.load(MODELS / (reference.prompts or name))
    return PromptFeatures.random(reference.text, reference.config["caption_channels"])


def noise(pipeline: PixelPipeline, count: int, seed: int = 0) -> Tensor:
    """Initial noise for `count` images."""
    return torch.randn(count, *pipeline.shape, generator=torch.Generator().manual_seed(seed))


def weights_digest(model: torch.nn.Module) -> str:
    """What tells a model's weights from others."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
