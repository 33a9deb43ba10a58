"""diffusers' FirstBlockCache: the first block's change decides at run time."""

from __future__ import annotations

from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache

from bench.models.pipelines import PixelPipeline

from .base import Peer
from .hooked import hooked


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    return hooked(pipeline, steps, apply_first_block_cache, lambda own: FirstBlockCacheConfig(threshold=float(setting)))


PEER = Peer("FirstBlockCache (diffusers)", ("0.02", "0.05", "0.08"), prepare)
