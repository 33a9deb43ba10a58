"""Schedule -> Program, pure Python: what a new schedule costs before anything touches a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import harmonica_rt as hrt
from harmonica_rt.lowering import lower

SIZES = {
    "dit-xl-2": ("DiTTransformer2DModel", 28, ("attn", "mlp")),
    "pixart-alpha": ("PixArtTransformer2DModel", 28, ("attn", "cross_attn", "mlp")),
}


def schedule(size: str, steps: int, kind: str) -> hrt.Schedule:
    """Every second step reused, or half of all entries at random: no two steps alike."""
    model, layers, branches = SIZES[size]
    compute = np.zeros((steps, layers, len(branches)), dtype=bool)
    if kind == "uniform:2":
        compute[::2] = True
    else:
        compute = np.random.default_rng(0).random(compute.shape) >= 0.5
        compute[0] = True
    return hrt.Schedule(compute, model=model, branches=branches, order=1)


@pytest.mark.parametrize("kind", ["uniform:2", "random:50"])
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("size", SIZES)
def test_lowering(benchmark: Any, size: str, steps: int, kind: str) -> None:
    benchmark.group = f"lowering, {size}, {steps} steps"
    plan = schedule(size, steps, kind)
    program = benchmark.pedantic(lower, args=(plan,), rounds=10, warmup_rounds=1)
    benchmark.extra_info["slots"] = program.slots
