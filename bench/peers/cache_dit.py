"""cache-dit: DBCache, with its TaylorSeer calibrator, and its static step mask."""

from __future__ import annotations

from typing import Any

from bench.models.pipelines import PixelPipeline

from .base import Peer, Running, with_denoiser


class Refreshed(Running):
    """`model` with its cache context renewed before each run: its step counter slips by one otherwise."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        import cache_dit

        if self.count():
            cache_dit.refresh_context(self.model, num_inference_steps=self.steps)
        return self.model(*args, **kwargs)


def prepare(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    import cache_dit

    kind, value = setting.rsplit(" ", 1)
    calibrator = None
    if "TaylorSeer" in kind:
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    if kind.startswith("mask"):
        mask = [int(step % int(value) == 0) for step in range(steps)]
        options = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
    else:
        options = {"residual_diff_threshold": float(value)}
    if not pipeline.batched_guidance:
        options["enable_separate_cfg"] = True
    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, **options)
    cache_dit.enable_cache(pipeline.transformer, cache_config=config, calibrator_config=calibrator)
    return with_denoiser(pipeline, Refreshed(pipeline.transformer, steps))


SETTINGS = (
    "DBCache 0.02",
    "DBCache 0.05",
    "DBCache 0.08",
    "DBCache, TaylorSeer 0.05",
    "DBCache, TaylorSeer 0.08",
    "mask, TaylorSeer, every 2",
    "mask, TaylorSeer, every 3",
    "mask, TaylorSeer, every 4",
)
PEER = Peer("cache-dit", SETTINGS, prepare, package="cache_dit")
