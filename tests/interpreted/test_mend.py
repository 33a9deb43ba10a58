"""The mended interpreter against torch's own casts, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from . import conftest
from .mend import from_bits, to_bits

pytestmark = pytest.mark.skipif(
    not conftest.NEEDED, reason="this triton's interpreter rounds bf16 itself: delete mend.py"
)


@triton.jit
def _copy(source, target, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < count, other=0)
    tl.store(target + at, value.to(target.dtype.element_ty), mask=at < count)


@triton.jit
def _add(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(source + at)
    tl.store(target + at, value + value)


@pytest.fixture
def values() -> torch.Tensor:
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40])
    floats = torch.cat([bits.view(torch.float32), special])
    return floats[~floats.isnan()]


def test_bits_round_as_torch_does(values: torch.Tensor) -> None:
    expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bits(values.numpy()), expected)
    back = torch.from_numpy(from_bits(expected))
    assert torch.equal(back, values.bfloat16().float())


@pytest.mark.parametrize(("here", "there"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_casts_in_a_kernel_are_torchs(here: torch.dtype, there: torch.dtype, values: torch.Tensor) -> None:
    source = values.to(here)
    target = torch.empty(len(source), dtype=there)
    _copy[(1,)](source, target, len(source), BLOCK=triton.next_power_of_2(len(source)))
    kind = torch.int16 if there == torch.bfloat16 else torch.int32
    assert torch.equal(target.view(kind), source.to(there).view(kind))


def test_bf16_arithmetic_without_a_cast_is_an_error() -> None:
    source = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="bf16 arithmetic"):
        _add[(1,)](source, source.clone(), BLOCK=8)
