"""torch.compile of the whole model, and diffusers' own way of compiling its repeated blocks."""

from __future__ import annotations

import torch

from ..pipelines import PixelPipeline
from .base import Peer, with_denoiser


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    if setting == "repeated blocks":
        pipeline.transformer.compile_repeated_blocks()
        return pipeline
    return with_denoiser(pipeline, torch.compile(pipeline.transformer))


PEER = Peer("torch.compile", ("full model", "repeated blocks"), prepare)
