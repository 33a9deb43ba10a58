"""diffusers' TaylorSeer hook. Its default patterns match nothing in DiT: it is told the branches' names."""

from __future__ import annotations

import re

import torch
from diffusers import TaylorSeerCacheConfig
from diffusers.hooks import apply_taylorseer_cache
from torch import nn

from bench.models.pipelines import PixelPipeline

from .base import Peer, branch_modules
from .hooked import Hooked, hooked


def patterns(model: nn.Module) -> dict[str, list[str]]:
    """Names of what is forecast, and of what is then not needed."""
    names = [re.escape(name) for name in branch_modules(model)]
    if not hasattr(model, "single_transformer_blocks"):
        return {"cache_identifiers": names}
    single = r"single_transformer_blocks\.\d+\."  # one projection takes what its attention and its MLP make
    return {
        "cache_identifiers": [*(name for name in names if not name.startswith("single")), f"{single}proj_out"],
        "skip_predict_identifiers": [f"{single}(attn|proj_mlp)"],
    }


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    order, interval = (int(part.split()[1]) for part in setting.split(", "))

    def config(own: Hooked) -> TaylorSeerCacheConfig:
        return TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=2,  # its default, 3, is slower, and worse at interval 3
            max_order=order,
            taylor_factors_dtype=torch.float32,
            **patterns(own.model),
        )

    return hooked(pipeline, steps, apply_taylorseer_cache, config)


SETTINGS = tuple(f"order {order}, interval {interval}" for order in (1, 2) for interval in (2, 3, 4))
PEER = Peer("TaylorSeer (diffusers)", SETTINGS, prepare)
