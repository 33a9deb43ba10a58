"""The same sampler with fewer steps: the baseline every cache has to beat."""

from __future__ import annotations

from bench.models.pipelines import PixelPipeline

from .base import Peer


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    pipeline.steps = int(setting)
    return pipeline


PEER = Peer("fewer steps", ("14", "10", "7", "5"), prepare)
