"""The kernel of the weighted sum itself, lane by lane, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from harmonica_rt.kernels.combine import DTYPES, MOST, combine, combine_kernel, launch_arguments
from harmonica_rt.kernels.combine_torch import combine_reference

from .test_gap import TOLERANCE, close


def launch(values: list, weights: list, rows: list, channels: torch.Tensor | None, inner: int) -> torch.Tensor:
    out = torch.full_like(values[0], 7.0)
    grid, arguments, constants = launch_arguments(out, values, weights, rows, channels, inner)
    constants.pop("num_warps")
    combine_kernel[grid](*arguments, **constants)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 63, 60), (1, 1, 1), (3, 5, 7, 9)])
@pytest.mark.parametrize("per_channel", ["none", "all", "some"])
@pytest.mark.parametrize("terms", [1, 3, MOST])
def test_against_float64(dtype: torch.dtype, shape: tuple, per_channel: str, terms: int) -> None:
    values = [torch.randn(shape).to(dtype) for _ in range(terms)]
    weights = torch.randn(terms).tolist()
    count, inner = (shape[1], shape[2] * shape[3]) if len(shape) == 4 else (shape[-1], 1)
    channels = torch.randn(9, count)
    rows = [{"none": -1, "all": 8 - k, "some": -1 if k % 2 else k}[per_channel] for k in range(terms)]
    arguments = (values, weights, rows, channels, inner)
    expected = combine_reference(*arguments)
    close(launch(*arguments), expected, TOLERANCE[dtype])
    close(combine(*arguments), expected, TOLERANCE[dtype])


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, MOST), st.integers(1, 40), st.integers(1, 70), st.integers(1, 5))
def test_any_size(seed: int, terms: int, tokens: int, width: int, rows: int) -> None:
    torch.manual_seed(seed)
    values = [torch.randn(2, tokens, width) for _ in range(terms)]
    channels = torch.randn(rows, width)
    chosen = torch.randint(-1, rows, (terms,)).tolist()
    arguments = (values, torch.randn(terms).tolist(), chosen, channels, 1)
    error = (launch(*arguments).double() - combine_reference(*arguments)).abs().max()
    assert error < 1e-4


def test_wrong_operands_are_named() -> None:
    x = torch.randn(2, 3, 4)
    for arguments, message in [
        (([x] * 8, [1.0] * 8, [-1] * 8, None, 1), "expected 1 to 7, got 8"),
        (([x, x], [1.0], [-1, -1], None, 1), "expected 2 each, got 1 and 2"),
        (([x.transpose(0, 1)], [1.0], [-1], None, 1), "expected contiguous tensors"),
        (([x, x.half()], [1.0, 1.0], [-1, -1], None, 1), "got .* torch.float16"),
        (([x], [1.0], [0], None, 1), r"rows: got \[0\]"),
        (([x], [1.0], [0], torch.randn(1, 5), 1), "expected them to divide 24, got 5"),
    ]:
        with pytest.raises(AssertionError, match=message):
            launch_arguments(arguments[0][0], *arguments)
