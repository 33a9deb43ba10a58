"""torch.compile: of the whole model, as diffusers compiles repeated blocks, and on top of other peers."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.models.pipelines import PixelPipeline

from .base import Peer, with_denoiser


def whole(pipeline: PixelPipeline) -> None:
    """The transformer, or what is inside a peer's wrapper around it."""
    denoiser = pipeline.transformer
    if hasattr(denoiser, "model"):
        denoiser.model = torch.compile(denoiser.model)
    else:
        with_denoiser(pipeline, torch.compile(denoiser))


def blocks(pipeline: PixelPipeline) -> None:
    """diffusers' own way."""
    getattr(pipeline.transformer, "model", pipeline.transformer).compile_repeated_blocks()


def under_compile(peer: Peer, *settings: str) -> Peer:
    """`peer` with its model compiled as a whole, hooks and all, at some of its settings."""
    return replace(peer, name=f"{peer.name}, torch.compile", settings=settings or peer.settings, compile=whole)


WHOLE = Peer("torch.compile, full model", ("full",), lambda pipeline, setting, steps: pipeline, whole)
BLOCKS = Peer("torch.compile, repeated blocks", ("full",), lambda pipeline, setting, steps: pipeline, blocks)
