"""GELU by shape and backend: what one exponential in place of torch's tanh saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harmonica_rt.kernels.gelu import compiled_gelu
from harmonica_rt.models.stages import Gelu

from .conftest import inductor

SHAPES = {"dit-fashion, batch 8": (392, 512), "dit-s-2, batch 2": (512, 1536)}


@pytest.mark.parametrize("backend", ["eager", inductor()])
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(benchmark: Any, shape: str, backend: str) -> None:
    benchmark.group = f"GELU tanh, {shape}"
    values = torch.randn(SHAPES[shape])
    h = values.clone()
    if backend == "eager":
        run: Callable[[], object] = lambda: Gelu("tanh").into(h, None, out=h)  # noqa: E731
    else:
        kernel = compiled_gelu("tanh", SHAPES[shape], h.dtype, h.device, torch.get_num_threads())
        run = lambda: kernel(h)  # noqa: E731

    def refresh() -> None:
        h.copy_(values)

    # in place: fresh values each round, or repeated application would end in denormal numbers
    benchmark.pedantic(run, setup=refresh, rounds=50, warmup_rounds=3)
