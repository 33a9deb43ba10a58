"""diffusers' FasterCache: attention reused, and the unconditional output forecast from the conditional one."""

from __future__ import annotations

from diffusers import FasterCacheConfig
from diffusers.hooks import apply_faster_cache

from ..pipelines import PixelPipeline
from .base import Peer
from .hooked import Hooked, hooked


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    every = int(setting.split()[1])

    def config(own: Hooked) -> FasterCacheConfig:
        return FasterCacheConfig(
            spatial_attention_block_skip_range=every,
            spatial_attention_timestep_skip_range=(-1, 1000),
            tensor_format="BCHW",
            is_guidance_distilled=True,  # its forecast of the unconditional half expects it first and as video
            current_timestep_callback=lambda: own.timestep,
        )

    return hooked(pipeline, steps, apply_faster_cache, config)


PEER = Peer("FasterCache (diffusers)", ("every 2", "every 3"), prepare)
