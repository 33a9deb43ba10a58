"""The weighted sum by plain torch ops and as an op, against float64."""

from __future__ import annotations

import pytest
import torch

from harmonica_rt.kernels.combine_torch import combine_eager, combine_reference

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["eager", "op"])
@pytest.mark.parametrize("shape", [(2, 63, 60), (3, 5, 7, 9)])
def test_against_float64(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if kind == "op":
        pytest.importorskip("triton")
        from harmonica_rt.kernels.combine import combine
    values = [torch.randn(shape).to(dtype) for _ in range(3)]
    count, inner = (shape[1], shape[2] * shape[3]) if len(shape) == 4 else (shape[-1], 1)
    arguments = (values, [0.5, -1.5, 2.0], [1, -1, 0], torch.randn(2, count), inner)
    actual, expected = (combine_eager if kind == "eager" else combine)(*arguments), combine_reference(*arguments)
    assert (actual.dtype, actual.shape) == (dtype, values[0].shape)
    error = (actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < TOLERANCE[dtype]


def test_complex_values() -> None:
    pytest.importorskip("triton")
    from harmonica_rt.kernels.combine import combine

    values = [torch.randn(2, 6, 4, dtype=torch.complex64) for _ in range(2)]
    arguments = [0.5, -1.5], [-1, 0], torch.randn(1, 4), 1
    wanted = 0.5 * values[0] + arguments[2][0] * values[1]
    torch.testing.assert_close(combine(values, *arguments), wanted)


def test_values_keep_what_they_hold() -> None:
    value = torch.randn(2, 3, 4).transpose(0, 2)
    before = value.clone()
    assert torch.equal(combine_eager([value], [1.0], [-1], None, 1), before)
    assert torch.equal(value, before)


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_compiled_kernels_neither_spill_nor_move_less_than_128_bits(architecture: int) -> None:
    pytest.importorskip("triton")
    from bench import aot

    built = [aot.build_sum(*variant) for variant in aot.sum_variants((architecture,))]
    assert len(built) == 24
    assert [b for b in built if not b.good] == []
    assert max(b.registers for b in built) <= 128
