"""diffusers' FasterCache: attention extrapolated, and the unconditional output forecast from the conditional one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FasterCacheConfig
from diffusers.hooks import apply_faster_cache
from torch import Tensor, nn

from bench.models.pipelines import PixelPipeline

from .base import Peer, expect_batched_guidance, with_denoiser
from .hooked import Hooked, hooked


class Swapped(nn.Module):
    """`denoiser` for a pipeline whose conditional samples come first: FasterCache wants them last."""

    def __init__(self, denoiser: Hooked) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config, self.dtype, self.device = denoiser.config, denoiser.dtype, denoiser.device

    @property
    def model(self) -> nn.Module:
        return self.denoiser.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.denoiser.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.denoiser(*map(swap, args), **{name: swap(value) for name, value in kwargs.items()})
        output.sample = swap(output.sample)
        return output


def swap(value: Any) -> Any:
    """The halves of a batch exchanged."""
    return torch.cat(value.chunk(2)[::-1]) if isinstance(value, Tensor) else value


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    expect_batched_guidance(pipeline, "FasterCache")
    every = int(setting.split()[1])
    arguments = ("timestep", "class_labels", "encoder_hidden_states", "encoder_attention_mask")

    def config(own: Hooked) -> FasterCacheConfig:
        return FasterCacheConfig(
            spatial_attention_block_skip_range=every,
            spatial_attention_timestep_skip_range=(-1, 1000),
            unconditional_batch_skip_range=every,
            tensor_format="BCHW",
            current_timestep_callback=lambda: own.timestep,
            _unconditional_conditional_input_kwargs_identifiers=list(arguments),
        )

    pipeline = hooked(pipeline, steps, apply_faster_cache, config)
    return with_denoiser(pipeline, Swapped(pipeline.transformer))


PEER = Peer("FasterCache (diffusers)", ("every 2", "every 3", "every 5"), prepare)
