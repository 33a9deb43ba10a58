"""Gap by shape, terms and implementation, as pytest-benchmark suites: pytest bench/kernels/bench_gap.py

On the CPU implementations here; on CUDA, `make bench-gpu` times the kernel. Groups compare the implementations of one
Gap; names stay the same from commit to commit, so that --benchmark-compare works against a stored baseline.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harmonica_rt.kernels.gap_torch import chunks, compiled_gap, gap_eager
from harmonica_rt.kernels.inductor import missing_compiler

torch.set_num_threads(1)
SHAPES = {"dit-fashion, batch 8": (8, 49, 128), "dit-s-2, batch 2": (2, 256, 384), "dit-xl-2, batch 2": (2, 256, 1152)}


def operands(shape: tuple[int, int, int], terms: int) -> tuple[torch.Tensor, list, list, list, tuple]:
    batch, _, width = shape
    rows = torch.randn(batch, terms + 2, width)
    row = [rows[:, r : r + 1] for r in range(terms + 2)]
    slots = [torch.randn(shape) for _ in range(terms)]
    return torch.randn(shape), slots, row[2:], [1e-3] * terms, (row[0], row[1], 1e-6)


def compiled_calls(x: torch.Tensor, slots: list, gates: list, weights: list, norm: tuple) -> Any:
    """The launches a plan makes for this Gap."""
    shift, scale, eps = norm
    calls, start, sizes, rows = [], 0, chunks(len(slots)), len(slots) + 2
    for n, terms in enumerate(sizes):
        last, part = n == len(sizes) - 1, slice(start, start + terms)
        start += terms
        kernel = compiled_gap(terms, last, tuple(x.shape), rows, x.dtype, x.device, torch.get_num_threads())
        scalars = torch.tensor([*weights[part], eps])
        calls.append((kernel, [scalars, *slots[part], *gates[part], *([shift, scale] if last else [])]))

    def run() -> None:
        stream = x
        for kernel, tensors in calls[:-1]:
            (stream,) = kernel(stream, *tensors)
        kernel, tensors = calls[-1]
        kernel(stream, *tensors)

    return run


@pytest.mark.parametrize("implementation", ["eager", "inductor", "cpu op"])
@pytest.mark.parametrize("terms", [0, 1, 3, 8, 48])
@pytest.mark.parametrize("shape", SHAPES)
def test_gap(benchmark: Any, shape: str, terms: int, implementation: str) -> None:
    benchmark.group = f"Gap, {shape}, {terms} terms"
    x, slots, gates, weights, norm = operands(SHAPES[shape], terms)
    if implementation == "eager":
        run = lambda: gap_eager(x, slots, gates, weights, norm)  # noqa: E731
    elif implementation == "inductor":
        if reason := missing_compiler("cpu"):
            pytest.skip(reason)
        run = compiled_calls(x, slots, gates, weights, norm)
    else:
        gap = pytest.importorskip("harmonica_rt.kernels.gap").gap
        table = torch.tensor([[k, 2 + k] for k in range(terms)], dtype=torch.int32).view(-1, 2)
        arena = torch.stack(slots) if slots else torch.zeros(1, *SHAPES[shape])
        rows = torch.cat([norm[0], norm[1], *gates], 1)[None].contiguous()
        step = torch.zeros(1, dtype=torch.int32)
        arguments = (x, torch.empty_like(x), arena, rows, step, table, torch.tensor(weights), "layer", 0, 1, 1e-6)
        run = lambda: gap(*arguments)  # noqa: E731
    size, launches = x.element_size() * x.numel(), 1 if implementation == "cpu op" else len(chunks(terms))
    benchmark.extra_info["least_bytes"] = size * (2 + terms + (terms > 0))
    benchmark.extra_info["launches"] = terms + 2 if implementation == "eager" else launches
    with torch.no_grad():
        benchmark.pedantic(run, rounds=20, iterations=5, warmup_rounds=2)
