"""The Gap kernel itself, lane by lane, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from harmonica_rt.kernels.gap import DTYPES, NORMS, gap, gap_kernel, gap_reference, launch_arguments

MIXED = [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]  # of the stream, and of modulation rows
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative RMS


GATES = (2, 3, 4, 5, -1, -2)  # rows, none, nothing to add


class Case:
    """Operands of one launch; everything a kernel must not read is NaN."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        terms: int,
        dtype: torch.dtype,
        gates: tuple[int, ...] = (2, 3, 4, 5),
        split: int = 0,
        rows: torch.dtype | None = None,
        slots: int = 3,
        fresh: bool = False,
    ):
        batch, _, width = shape
        self.shape, self.dtype, self.step, self.split, self.fresh = shape, dtype, 1, split, fresh
        self.x = _padded((torch.full(shape, torch.nan) if fresh else torch.randn(shape) * 2 + 1).to(dtype))
        self.rows = torch.full((3, batch, 8, width), torch.nan).to(rows or dtype)
        self.rows[self.step] = torch.randn(batch, 8, width).to(rows or dtype)
        self.table = [(k % slots, gates[k % len(gates)], gates[(k // 2 + k) % len(gates)]) for k in range(terms)]
        arena = torch.randn(slots, *shape).to(dtype)
        for slot in range(slots):
            for n, part in enumerate((slice(0, split), slice(split, None))):
                if all(entry[1 + n] == -2 for entry in self.table if entry[0] == slot):
                    arena[slot, :, part] = torch.nan
        self.arena = _padded(arena)
        self.weights = torch.randn(terms).tolist()

    def launch(self, norm: str, shift: tuple[int, int] = (0, 6), scale: tuple[int, int] = (1, 7), kernel: bool = True):
        x, y = _padded(self.x.clone()), _padded(torch.full(self.shape, 7.0).to(self.dtype))
        table = torch.tensor(self.table, dtype=torch.int32).view(-1, 3)
        step, weights = torch.tensor([self.step], dtype=torch.int32), torch.tensor(self.weights, dtype=torch.float32)
        call = (x, y, self.arena, self.rows, step, table, weights, norm, shift, scale, 1e-5, self.split, self.fresh)
        if kernel:
            grid, arguments, constants = launch_arguments(*call)
            constants.pop("num_warps")
            gap_kernel[grid](*arguments, **constants)
        else:
            gap(*call)
        for tensor in (x, y):
            border = torch.as_strided(tensor, (16,), (1,), tensor.storage_offset() + tensor.numel())
            assert border.isnan().all(), "written past the end"
        return x, y

    def reference(self, norm: str, shift: tuple[int, int] = (0, 6), scale: tuple[int, int] = (1, 7)):
        arguments = (self.x, self.arena, self.rows, self.step, self.table, self.weights)
        return gap_reference(*arguments, norm, shift, scale, 1e-5, self.split, self.fresh)


def _padded(values: torch.Tensor) -> torch.Tensor:
    """`values` with NaN before and after them in memory."""
    storage = torch.full((values.numel() + 32,), torch.nan, dtype=values.dtype)
    storage[16:-16] = values.flatten()
    return storage[16:-16].view(values.shape)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= tolerance, f"relative RMS {error:.1e} above {tolerance:.0e}"


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "cpu op"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "terms"), [((1, 1, 4), 1), ((2, 63, 60), 3), ((3, 5, 33), 0), ((2, 7, 1152), 5), ((1, 2, 128), 56)]
)
def test_against_float64(shape: tuple[int, int, int], terms: int, norm: str, dtype: torch.dtype, kernel: bool) -> None:
    case = Case(shape, terms, dtype, (-1, 2) if terms == 3 else (2, 3, 4, 5))
    x, y = case.launch(norm, kernel=kernel)
    wanted_x, wanted_y = case.reference(norm)
    assert x.dtype == y.dtype == dtype
    close(x, wanted_x, TOLERANCE[dtype])
    if norm == "none":
        assert (y == 7).all(), "y is left alone"
    else:
        close(y, wanted_y, TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "cpu op"])
@pytest.mark.parametrize(("dtype", "rows"), [*((dtype, dtype) for dtype in DTYPES), *MIXED])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((2, 9, 40), 4),
        ((3, 5, 33), 1),  # 16 rows a program: of both segments, and of all samples
        ((2, 7, 1152), 3),
        ((3, 5, 33), 0),
        ((3, 5, 33), 5),
        ((1, 2, 384), 1),  # 2 rows a program, one of either segment
    ],
)
def test_two_segments(
    shape: tuple[int, int, int], split: int, norm: str, dtype: torch.dtype, rows: torch.dtype, kernel: bool
) -> None:
    case = Case(shape, 7, dtype, GATES, split, rows)
    x, y = case.launch(norm, kernel=kernel)
    assert x.dtype == y.dtype == dtype
    for actual, expected in zip((x, y) if norm != "none" else (x,), case.reference(norm)):
        for part in (slice(0, split), slice(split, None)):
            if actual[:, part].numel():
                close(actual[:, part], expected[:, part], TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "cpu op"])
def test_a_segment_to_which_terms_add_nothing_keeps_its_bits(kernel: bool) -> None:
    case = Case((2, 9, 40), 2, torch.bfloat16, split=4)
    case.table = [(0, -2, 3), (1, -2, -1)]
    case.arena[:, :, :4] = torch.nan  # never written: no branch of this block updates it
    x, y = case.launch("layer", kernel=kernel)
    assert torch.equal(x[:, :4], case.x[:, :4])
    for actual, expected in zip((x, y), case.reference("layer")):
        close(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "cpu op"])
@pytest.mark.parametrize(("shift", "scale"), [((-1, -1), (-1, -1)), ((0, -1), (-1, 1)), ((-1, 0), (1, -1))])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_missing_modulation(norm: str, shift: tuple[int, int], scale: tuple[int, int], kernel: bool) -> None:
    case = Case((2, 9, 40), 2, torch.float32, split=5)
    _, y = case.launch(norm, shift, scale, kernel)
    close(y, case.reference(norm, shift, scale)[1], 1e-6)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "cpu op"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("terms", [0, 1, 5])
def test_a_fresh_gap_reads_nothing_of_the_stream(terms: int, norm: str, dtype: torch.dtype, kernel: bool) -> None:
    case = Case((2, 9, 40), terms, dtype, GATES, split=4, fresh=True)
    x, y = case.launch(norm, kernel=kernel)
    wanted_x, wanted_y = case.reference(norm)
    if terms:
        close(x, wanted_x, TOLERANCE[dtype])
    else:
        assert not x.any()
    if norm != "none":
        close(y, wanted_y, TOLERANCE[dtype])


def test_without_terms_the_stream_keeps_its_bits() -> None:
    case = Case((2, 9, 40), 0, torch.bfloat16)
    x, _ = case.launch("layer")
    assert torch.equal(x, case.x)


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 9), st.integers(1, 70), st.integers(0, 6))
def test_any_shape(data: st.DataObject, seed: int, batch: int, tokens: int, width: int, terms: int) -> None:
    torch.manual_seed(seed)
    dtype, rows = data.draw(st.sampled_from([*((dtype, dtype) for dtype in DTYPES), *MIXED]), "dtypes")
    gates = data.draw(st.lists(st.sampled_from(GATES), min_size=1, max_size=5).map(tuple), "gates")
    pair = st.tuples(st.integers(-1, 7), st.integers(-1, 7))
    modulation = data.draw(pair, "shift"), data.draw(pair, "scale")
    norm = data.draw(st.sampled_from(["layer", "rms"] if width > 8 else ["rms"]), "norm")
    split, fresh = data.draw(st.integers(0, tokens), "split"), data.draw(st.booleans(), "fresh")
    case = Case((batch, tokens, width), terms, dtype, gates, split, rows, fresh=fresh)
    for actual, expected in zip(case.launch(norm, *modulation), case.reference(norm, *modulation)):
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCE[dtype] * expected.abs().max() + 1e-4, "sums and narrow rows may cancel"


@hypothesis_settings(max_examples=20)
@given(st.integers(0, 2**16), st.permutations(range(5)))
def test_the_order_of_terms_does_not_matter(seed: int, order: list[int]) -> None:
    torch.manual_seed(seed)
    case = Case((2, 5, 24), 5, torch.float32)
    x, y = case.launch("layer")
    case.table, case.weights = [case.table[k] for k in order], [case.weights[k] for k in order]
    for actual, expected in zip(case.launch("layer"), (x, y)):
        close(actual, expected.double(), 1e-6)


def test_terms_of_weight_zero_add_nothing() -> None:
    case = Case((2, 5, 24), 5, torch.float32)
    case.weights = [0.0] * 5
    assert torch.equal(case.launch("none")[0], case.x)


def test_order_one_is_explicit_extrapolation() -> None:
    case = Case((2, 5, 24), 2, torch.float32)
    case.table, case.weights = [(0, 3, 3), (1, 3, 3)], [1.5, -0.5]
    newest, before = case.arena[0], case.arena[1]
    expected = case.x + case.rows[1][:, 3][:, None] * (newest + 0.5 * (newest - before))
    close(case.launch("none")[0], expected.double(), 1e-6)
