"""diffusers' cache hooks on a transformer, whether or not its pipeline has cache contexts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import nn

from bench.models.pipelines import PixelPipeline

from .base import Running, with_denoiser


class Hooked(Running):
    """`model` under a cache context; its hooks forget at the first call of a run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        registry = HookRegistry.check_if_exists_or_initialize(self.model)
        if self.count():
            registry.reset_stateful_hooks()
        self._timestep = kwargs["timestep"]
        context = CacheContext(self.context or "run", **self.where(kwargs))
        _set_cache_context(self.model, context)  # as CacheMixin, which DiT and PixArt lack
        try:
            return self.model(*args, **kwargs)
        finally:
            _set_cache_context(self.model, None)

    @property
    def timestep(self) -> int:
        """Of the call under way, for hooks that ask: on a GPU asking has the host wait."""
        return int(self._timestep[0])

    def where(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a hook wants to know of where the run is."""
        return {}


def hooked(
    pipeline: PixelPipeline, steps: int, apply: Callable[[nn.Module, Any], None], config: Callable[[Hooked], Any]
) -> PixelPipeline:
    """`pipeline` with diffusers' `apply`(transformer, `config`(its wrapper)) done to it."""
    own = Hooked(pipeline.transformer, steps)
    apply(own.model, config(own))
    HookRegistry.check_if_exists_or_initialize(own.model).invalidate_child_registries_cache()
    return with_denoiser(pipeline, own)
