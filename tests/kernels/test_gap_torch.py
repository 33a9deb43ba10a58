"""Gap: eager and compiled against float64, for every number of terms a launch takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmonica_rt.kernels.gap_torch import CHUNKS, chunks, compiled_gap, gap_eager, gap_reference

from ..conftest import needs_compiler

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative RMS


def operands(terms: int, shape: tuple[int, int, int], dtype: torch.dtype, rows: int = 7) -> tuple:
    batch, _, width = shape
    table = torch.randn(batch, rows + terms, width).to(dtype)
    row = [table[:, r : r + 1] for r in range(rows + terms)]  # strided, as modulation rows are
    slots = [torch.randn(shape).to(dtype) for _ in range(terms)]
    x = (torch.randn(shape) * 2 + 1).to(dtype)
    return x, slots, row[2 : 2 + terms], torch.randn(terms).tolist(), (row[0], row[1], 1e-5), rows + terms


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert expected.dtype == torch.float64
    assert actual.shape == expected.shape
    error = (actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= tolerance, f"relative RMS {error:.1e} above {tolerance:.0e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 63, 60), (3, 5, 33)])
@pytest.mark.parametrize("terms", [0, 1, 5])
def test_eager(terms: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, slots, gates, weights, norm, _ = operands(terms, shape, dtype)
    wanted = gap_reference(x, slots, gates, weights, norm)
    moved, y = gap_eager(x, slots, gates, weights, norm)
    assert moved is x, "in place"
    assert y.dtype == dtype
    for actual, expected in zip((moved, y), wanted):
        assert_close(actual, expected, TOLERANCE[dtype] * max(1, terms))  # eager rounds to storage after each term


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("terms", [0, *CHUNKS])
def test_compiled(terms: int, dtype: torch.dtype) -> None:
    shape = (2, 63, 60)
    x, slots, gates, weights, norm, rows = operands(terms, shape, dtype)
    wanted = gap_reference(x, slots, gates, weights, norm)
    before = x.clone()
    scalars = torch.tensor([*weights, norm[2]])
    kernel = compiled_gap(terms, True, shape, rows, dtype, x.device, torch.get_num_threads())
    *moved, y = kernel(x, scalars, *slots, *gates, *norm[:2])
    assert torch.equal(x, before), "the stream is not changed in place"
    assert len(moved) == (terms > 0)
    assert {t.dtype for t in (*moved, y)} == {dtype}
    for actual, expected in zip([*moved, y], wanted if terms else wanted[1:]):
        assert_close(actual, expected, TOLERANCE[dtype])
    if terms:
        kernel = compiled_gap(terms, False, shape, rows, dtype, x.device, torch.get_num_threads())
        (moved,) = kernel(x, scalars, *slots, *gates)
        assert_close(moved, wanted[0], TOLERANCE[dtype])


@given(st.integers(0, 2000))
def test_chunks_add_up_in_few_launches(terms: int) -> None:
    sizes = chunks(terms)
    assert sum(sizes) == terms
    assert set(sizes) <= {0, *CHUNKS}
    assert len(sizes) <= terms // 8 + 3 or terms == 0
    assert sizes == sorted(sizes, reverse=True)


def test_weights_of_order_one_are_extrapolation() -> None:
    x, slots, gates, _, norm, _ = operands(2, (2, 5, 8), torch.float64)
    gates = [gates[0]] * 2
    moved, _ = gap_reference(x, slots, gates, [1.5, -0.5], norm)
    torch.testing.assert_close(moved, x + gates[0] * (slots[0] + 0.5 * (slots[0] - slots[1])))
