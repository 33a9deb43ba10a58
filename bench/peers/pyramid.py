"""diffusers' PyramidAttentionBroadcast: attention reused every so many steps, in the timesteps it is made for."""

from __future__ import annotations

from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_pyramid_attention_broadcast

from bench.models.pipelines import PixelPipeline

from .base import Peer, branch_modules, expect_batched_guidance
from .hooked import Hooked, hooked


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    expect_batched_guidance(pipeline, "PyramidAttentionBroadcast")
    every = int(setting.split()[1])

    def config(own: Hooked) -> PyramidAttentionBroadcastConfig:
        cross = every if any(name.endswith("attn2") for name in branch_modules(own.model)) else None
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every,
            cross_attention_block_skip_range=cross,
            spatial_attention_timestep_skip_range=(-1, 1000),
            cross_attention_timestep_skip_range=(-1, 1000),
            current_timestep_callback=lambda: own.timestep,
        )

    return hooked(pipeline, steps, apply_pyramid_attention_broadcast, config)


PEER = Peer("PyramidAttentionBroadcast (diffusers)", ("every 2", "every 3"), prepare)
