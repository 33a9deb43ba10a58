"""Gap: eager and compiled against float64, for every number of terms a launch takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.measure.launches import CountLaunches
from harmonica_rt.kernels.gap_torch import MOST, NOTHING, chunks, compiled_gap, gap_eager, gap_reference

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
@pytest.mark.parametrize("terms", range(MOST + 1))
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


SPLITS = [(3, 5, 33), 1], [(2, 63, 60), 31], [(2, 7, 12), 0], [(2, 7, 12), 7]
MIXED = [*((dtype, dtype) for dtype in TOLERANCE), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


def segment_operands(terms: int, shape: tuple[int, int, int], dtype: torch.dtype, rows_dtype: torch.dtype) -> tuple:
    """As `operands`, with rows of their own in both segments: of the second terms the first segment has no part."""
    x, slots, gates, weights, (shift, scale, eps), _ = operands(2 * terms + 2, shape, dtype)
    row = [gate.to(rows_dtype) for gate in (*gates, shift, scale)]
    pairs = [(NOTHING if k % 3 == 1 else row[2 * k], row[2 * k + 1]) for k in range(terms)]
    return x, slots[:terms], pairs, weights[:terms], ((row[-1], row[-2]), (row[-3], row[-4]), eps)


def by_segment(actual: torch.Tensor, expected: torch.Tensor, split: int, tolerance: float) -> None:
    for part in (slice(0, split), slice(split, None)):
        if actual[:, part].numel():
            assert_close(actual[:, part], expected[:, part], tolerance)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("dtype", "rows_dtype"), MIXED)
@pytest.mark.parametrize(("shape", "split"), SPLITS)
@pytest.mark.parametrize("terms", [0, 1, 5])
def test_eager_by_segment(
    terms: int, shape: tuple, split: int, dtype: torch.dtype, rows_dtype: torch.dtype, kind: str
) -> None:
    x, slots, gates, weights, norm = segment_operands(terms, shape, dtype, rows_dtype)
    if terms > 1:
        slots[1][:, :split] = torch.nan  # nothing is read there
        gates[2] = None
        gates[3] = (None, gates[3][1])
    wanted = gap_reference(x, slots, gates, weights, norm, split, kind)
    before = x.clone()
    moved, y = gap_eager(x, slots, gates, weights, norm, split, kind)
    assert moved is x, "in place"
    assert y.dtype == dtype
    for actual, expected in zip((moved, y), wanted):
        by_segment(actual, expected, split, TOLERANCE[dtype] * max(1, terms))
    assert terms or torch.equal(x, before)


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", ["shift", "scale", "both"])
@pytest.mark.parametrize("where", ["first", "second", "all"])
def test_eager_without_shift_or_scale(missing: str, where: str, rows_dtype: torch.dtype) -> None:
    x, _, _, _, (*rows, eps) = segment_operands(0, (2, 7, 12), torch.bfloat16, rows_dtype)
    for n, name in enumerate(("shift", "scale")):
        if missing in (name, "both"):
            first, second = rows[n]
            rows[n] = {"first": (None, second), "second": (first, None), "all": None}[where]
    wanted = gap_reference(x, [], [], [], (*rows, eps), 3)[1]
    by_segment(gap_eager(x, [], [], [], (*rows, eps), 3)[1], wanted, 3, TOLERANCE[torch.bfloat16])


def test_eager_launches_no_more_than_it_says() -> None:
    def launches(gates: list, norm: tuple | None) -> int:
        x, slots = torch.randn(2, 7, 12), [torch.randn(2, 7, 12) for _ in gates]
        with CountLaunches() as counted:
            gap_eager(x, slots, gates, [1.0] * len(gates), norm, 3)
        return counted.count

    row = torch.randn(2, 1, 12)
    assert launches([row, None, row], (row, row, 1e-5)) == 5, "one segment: one a term, two for the norm"
    assert launches([(row, row), (NOTHING, row), row], None) == 4
    assert launches([], ((row, row), (row, row), 1e-5)) == 3


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "split", "dtype", "rows_dtype"),
    [*((*SPLITS[0], *dtypes) for dtypes in MIXED), *((*split, *MIXED[0]) for split in SPLITS[1:])],
)
@pytest.mark.parametrize(("terms", "kind"), [(0, "rms"), (4, "layer")])
def test_compiled_by_segment(
    terms: int, shape: tuple, split: int, dtype: torch.dtype, rows_dtype: torch.dtype, kind: str
) -> None:
    x, slots, gates, weights, norm = segment_operands(terms, shape, dtype, rows_dtype)
    wanted = gap_reference(x, slots, gates, weights, norm, split, kind)
    before, scalars = x.clone(), torch.tensor([*weights, norm[2]])
    zero = torch.zeros(shape[0], 1, shape[2], dtype=rows_dtype)
    rows = 9

    def placed(row: torch.Tensor) -> torch.Tensor:  # strided, as the kernel is compiled for
        table = torch.full((shape[0], rows, shape[2]), torch.nan, dtype=rows_dtype)
        table[:, 2:3] = row
        return table[:, 2:3]

    segments = [
        [placed(zero if gate[n] is NOTHING else gate[n]) for gate in gates] + [placed(norm[0][n]), placed(norm[1][n])]
        for n in range(2)
    ]
    fixed = (shape, rows, dtype, x.device, torch.get_num_threads(), split, rows_dtype, kind)
    *moved, y = compiled_gap(terms, True, *fixed)(x, scalars, *slots, *segments[0], *segments[1])
    assert torch.equal(x, before), "the stream is not changed in place"
    assert len(moved) == (terms > 0)
    assert {t.dtype for t in (*moved, y)} == {dtype}
    for actual, expected in zip([*moved, y], wanted if terms else wanted[1:]):
        by_segment(actual, expected, split, TOLERANCE[dtype])
    if terms:
        first, second = (segment[:terms] for segment in segments)
        (moved,) = compiled_gap(terms, False, *fixed)(x, scalars, *slots, *first, *second)
        by_segment(moved, wanted[0], split, TOLERANCE[dtype])


@given(st.integers(0, 2000))
def test_chunks_add_up_in_few_launches(terms: int) -> None:
    sizes = chunks(terms)
    assert sum(sizes) == terms
    assert all(size == MOST for size in sizes[:-1])
    assert 0 < sizes[-1] <= MOST or terms == 0
    assert sizes == sorted(sizes, reverse=True)


def test_weights_of_order_one_are_extrapolation() -> None:
    x, slots, gates, _, norm, _ = operands(2, (2, 5, 8), torch.float64)
    gates = [gates[0]] * 2
    moved, _ = gap_reference(x, slots, gates, [1.5, -0.5], norm)
    torch.testing.assert_close(moved, x + gates[0] * (slots[0] + 0.5 * (slots[0] - slots[1])))
