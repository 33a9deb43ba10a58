"""diffusers' MagCache, calibrated on this model first as it asks."""

from __future__ import annotations

import contextlib
import copy
import io

from diffusers import MagCacheConfig
from diffusers.hooks import apply_mag_cache

from bench.models.pipelines import PixelPipeline
from bench.models.reference import noise

from .base import Peer
from .hooked import hooked


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    own = pipeline.around(copy.deepcopy(pipeline.transformer))
    calibrating = hooked(
        own, steps, apply_mag_cache, lambda _: MagCacheConfig(calibrate=True, num_inference_steps=steps)
    )
    said = io.StringIO()  # it prints what it found, context by context, conditional first
    with contextlib.redirect_stdout(said):
        calibrating(own.examples(4), num_inference_steps=steps, latents=noise(pipeline, 4, 1), output_type="latent")
    found = [line for line in said.getvalue().splitlines() if line.startswith("[") and line[1:2].isdigit()]
    ratios = [float(number) for number in found[0].strip("[]").split(",")]

    def config(_: object) -> MagCacheConfig:
        return MagCacheConfig(threshold=float(setting), num_inference_steps=steps, mag_ratios=ratios)

    return hooked(pipeline, steps, apply_mag_cache, config)


PEER = Peer("MagCache (diffusers)", ("0.06", "0.12", "0.24"), prepare)
