"""GELU by shape and implementation, as a pytest-benchmark suite: pytest bench/kernels/bench_gelu.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harmonica_rt.kernels.gelu import compiled_gelu, gelu_eager
from harmonica_rt.kernels.inductor import missing_compiler

torch.set_num_threads(1)
SHAPES = {"dit-fashion, batch 8": (392, 512), "dit-s-2, batch 2": (512, 1536)}


@pytest.mark.parametrize("implementation", ["eager", "inductor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(benchmark: Any, shape: str, implementation: str) -> None:
    benchmark.group = f"GELU tanh, {shape}"
    values = torch.randn(SHAPES[shape])
    h = values.clone()
    if implementation == "eager":
        run = lambda: gelu_eager(h, "tanh")  # noqa: E731
    else:
        if reason := missing_compiler("cpu"):
            pytest.skip(reason)
        kernel = compiled_gelu("tanh", SHAPES[shape], h.dtype, h.device, torch.get_num_threads())
        run = lambda: kernel(h)  # noqa: E731

    def refresh() -> None:
        h.copy_(values)

    # in place: fresh values each round, or repeated application would end in denormal numbers
    benchmark.pedantic(run, setup=refresh, rounds=50, warmup_rounds=3)
