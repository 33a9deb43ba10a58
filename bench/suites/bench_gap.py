"""Gap by shape, terms and backend: what a run of reused branches costs up to the next computed one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harmonica_rt.kernels.gap_torch import chunks, compiled_gap, gap_eager

from .conftest import inductor

SHAPES = {"dit-fashion, batch 8": (8, 49, 128), "dit-s-2, batch 2": (2, 256, 384), "dit-xl-2, batch 2": (2, 256, 1152)}
TERMS = (0, 1, 3, 8, 48)
ROWS = max(TERMS) + 2  # modulation rows: as in a model, the same whatever a Gap adds


def operands(shape: tuple[int, int, int], terms: int) -> tuple[torch.Tensor, list, list, list, tuple]:
    """What `gap_eager` takes: x, slots, gates, weights, norm."""
    batch, _, width = shape
    rows = torch.randn(batch, ROWS, width)
    row = [rows[:, r : r + 1] for r in range(terms + 2)]
    slots = [torch.randn(shape) for _ in range(terms)]
    return torch.randn(shape), slots, row[2:], [1e-3] * terms, (row[0], row[1], 1e-6)


def compiled_calls(x: torch.Tensor, slots: list, gates: list, weights: list, norm: tuple) -> Callable[[], None]:
    """The launches a plan makes for this Gap."""
    shift, scale, eps = norm
    calls, start, sizes = [], 0, chunks(len(slots))
    for n, terms in enumerate(sizes):
        last, part = n == len(sizes) - 1, slice(start, start + terms)
        start += terms
        kernel = compiled_gap(terms, last, tuple(x.shape), ROWS, x.dtype, x.device, torch.get_num_threads())
        scalars = torch.tensor([*weights[part], eps])
        calls.append((kernel, [scalars, *slots[part], *gates[part], *([shift, scale] if last else [])]))

    def run() -> None:
        stream = x
        for kernel, tensors in calls[:-1]:
            (stream,) = kernel(stream, *tensors)
        kernel, tensors = calls[-1]
        kernel(stream, *tensors)

    return run


@pytest.mark.parametrize("backend", ["eager", inductor()])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gap(benchmark: Any, shape: str, terms: int, backend: str) -> None:
    benchmark.group = f"Gap, {shape}, {terms} terms"
    x, slots, gates, weights, norm = operands(SHAPES[shape], terms)
    if backend == "eager":
        run: Callable[[], object] = lambda: gap_eager(x, slots, gates, weights, norm)  # noqa: E731
    else:
        run = compiled_calls(x, slots, gates, weights, norm)
    benchmark.extra_info["least_bytes"] = x.element_size() * x.numel() * (2 + terms + (terms > 0))
    benchmark.extra_info["launches"] = terms + 2 if backend == "eager" else len(chunks(terms))
    with torch.no_grad():
        benchmark.pedantic(run, rounds=12, iterations=4, warmup_rounds=2)
