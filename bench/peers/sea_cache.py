"""diffusers' SeaCache: a spectral measure of the input's change decides at run time."""

from __future__ import annotations

from typing import Any

from diffusers import SeaCacheConfig
from diffusers.hooks import HookRegistry, apply_sea_cache
from torch import Tensor, nn

from bench.models.pipelines import PixelPipeline

from .base import Peer, with_denoiser
from .hooked import Hooked


class Located(Hooked):
    """SeaCache wants step, noise level and step count with each call's context."""

    def __init__(self, pipeline: PixelPipeline, steps: int) -> None:
        super().__init__(pipeline.transformer, steps)
        self.alphas = getattr(pipeline.scheduler, "alphas_cumprod", None)

    def where(self, arguments: dict[str, Any]) -> dict[str, Any]:
        step = (self.calls[self.context] - 1) % self.steps
        return {"step_index": step, "sigma": self.sigma, "num_inference_steps": self.steps}

    @property
    def sigma(self) -> float:
        """The noise's share of noise and signal."""
        if self.alphas is None:  # flow matching: it is what the model is told
            return float(self._timestep[0])
        signal, noise = self.alphas[self.timestep].item() ** 0.5, (1 - self.alphas[self.timestep].item()) ** 0.5
        return noise / (signal + noise)


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    own = Located(pipeline, steps)

    def latents(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What SeaCache compares from step to step: each sample as [channels, frames, height, width]."""
        samples = pipeline.pictures(args[0] if args else kwargs["hidden_states"])
        return [image.unsqueeze(1) for image in samples]

    apply_sea_cache(own.model, SeaCacheConfig(threshold=float(setting), raw_vision_callback=latents))
    HookRegistry.check_if_exists_or_initialize(own.model).invalidate_child_registries_cache()
    return with_denoiser(pipeline, own)


PEER = Peer("SeaCache (diffusers)", ("0.1", "0.25", "0.5"), prepare)
