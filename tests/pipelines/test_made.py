"""The made pipelines run, always the same, and call their denoisers as `made` says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from .made import MADE
from .parts import STEPS, blocks_of


class Listener:
    """Notes every call of a pipeline's denoisers: which, and the name it is given; and the samples' batch."""

    def __init__(self, pipe: DiffusionPipeline, denoisers: tuple[str, ...]) -> None:
        self.calls: list[tuple[str, str | None]] = []
        self.batches: list[int] = []
        self.name: str | None = None
        for denoiser in denoisers:
            model = getattr(pipe, denoiser)
            model.register_forward_pre_hook(
                lambda _, args, kwargs, d=denoiser: self.note(d, args, kwargs), with_kwargs=True
            )
            if hasattr(model, "cache_context"):
                model.cache_context = self.cache_context

    def note(self, denoiser: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((denoiser, self.name))
        self.batches.append(len(args[0] if args else kwargs["hidden_states"]))

    @contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        self.name = name
        yield
        self.name = None


@pytest.mark.parametrize("name", MADE)
def test_it_calls_its_denoiser_as_written(name: str) -> None:
    made = MADE[name]
    pipe = made.make()
    models = [getattr(pipe, denoiser) for denoiser in made.denoisers]
    listener = Listener(pipe, made.denoisers)
    latents = made.call(pipe)
    assert listener.calls == [(call.denoiser, call.context if made.named else None) for call in made.calls]
    assert (min(listener.batches) < max(listener.batches)) == (made.kept is not None or "skipped" in name)
    assert latents.isfinite().all() and latents.std() > 0.1
    assert torch.equal(made.call(pipe), latents), "another run"
    assert torch.equal(made.call(made.make()), latents), "another pipeline"
    assert not torch.equal(made.call(pipe, num_inference_steps=STEPS - 1), latents)
    for model in models:
        assert not any(module.training for module in model.modules())
        for blocks in made.streams:
            assert len(blocks_of(model, blocks)) >= (1 if blocks.endswith("mid_block") else 2)
