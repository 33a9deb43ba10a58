"""The weighted sum that stands in for a reused value on a GPU: one pass over it, as a Triton kernel.

    o = sum_k weights[k] * values[k]            weights[k] a number, or one for each channel

Shapes and dtypes as in `combine_torch`. Values are up to seven tensors wherever they lie: an order-2 sum with a carry
has three values, the streams before them, and the stream now. Numbers and rows are arguments, so that a schedule
compiles nothing: variants differ in how many values there are and whether any weight is per channel.

Imports triton: only what runs on a GPU imports this file.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine_torch import combine_eager

MOST = 7
BLOCK, WARPS = 1024, 4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NUMBERS = [f"{kind}{k}" for kind in "wr" for k in range(MOST)]


@triton.jit
def _term(value_ptr, weight, row, channels_ptr, at, mask, channel, count, CHANNELS: tl.constexpr):
    value = tl.load(value_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if CHANNELS:
        own = mask & (row >= 0)
        weight = tl.load(channels_ptr + row * count + channel, mask=own, other=0.0) + tl.where(own, 0.0, weight)
    return weight * value


# Only whether `total` is a multiple of 16, which lets loads be wide, makes another variant
@triton.jit(do_not_specialize=[*_NUMBERS, "inner", "count"])
def combine_kernel(
    out_ptr, v0, v1, v2, v3, v4, v5, v6, channels_ptr,
    w0, w1, w2, w3, w4, w5, w6, r0, r1, r2, r3, r4, r5, r6,
    total, inner, count,
    TERMS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], below 2**31: a division of 64 bits is a call
    mask = at < total
    channel = (at // inner) % count
    o = _term(v0, w0, r0, channels_ptr, at, mask, channel, count, CHANNELS)
    if TERMS > 1:
        o += _term(v1, w1, r1, channels_ptr, at, mask, channel, count, CHANNELS)
    if TERMS > 2:
        o += _term(v2, w2, r2, channels_ptr, at, mask, channel, count, CHANNELS)
    if TERMS > 3:
        o += _term(v3, w3, r3, channels_ptr, at, mask, channel, count, CHANNELS)
    if TERMS > 4:
        o += _term(v4, w4, r4, channels_ptr, at, mask, channel, count, CHANNELS)
    if TERMS > 5:
        o += _term(v5, w5, r5, channels_ptr, at, mask, channel, count, CHANNELS)
    if TERMS > 6:
        o += _term(v6, w6, r6, channels_ptr, at, mask, channel, count, CHANNELS)
    tl.store(out_ptr + at, o.to(out_ptr.dtype.element_ty), mask=mask)


def launch_arguments(
    out: Tensor, values: list[Tensor], weights: list[float], rows: list[int], channels: Tensor | None, inner: int
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, positional and constant arguments of a launch, checked."""
    assert 1 <= len(values) <= MOST, f"values: expected 1 to {MOST}, got {len(values)}"
    assert len(weights) == len(rows) == len(values), (
        f"weights, rows: expected {len(values)} each, got {len(weights)} and {len(rows)}"
    )
    assert out.dtype in DTYPES, f"values: expected one of {DTYPES}, got {out.dtype}"
    for value in (out, *values):
        assert value.shape == out.shape and value.dtype == out.dtype and value.device == out.device, (
            f"values: expected {list(out.shape)} {out.dtype} on {out.device}, got {list(value.shape)} {value.dtype} on "
            f"{value.device}"
        )
        assert value.is_contiguous(), f"values: expected contiguous tensors, got strides {value.stride()}"
    assert out.numel() < 2**31, f"values: expected fewer than 2**31 elements, got {out.numel()}"
    count = 1
    if channels is not None:
        count = channels.shape[1]
        assert channels.dtype == torch.float32 and channels.is_contiguous(), (
            f"channels: expected contiguous float32, got {channels.dtype}, strides {channels.stride()}"
        )
        assert out.numel() % (count * inner) == 0, f"channels: expected them to divide {out.numel()}, got {count}"
    assert all(-1 <= row < (0 if channels is None else len(channels)) for row in rows), f"rows: got {rows}"
    more = MOST - len(values)
    tensors = (out, *values, *[values[0]] * more, out if channels is None else channels)
    numbers = (*weights, *[0.0] * more, *rows, *[-1] * more, out.numel(), inner, count)
    constants = {"TERMS": len(values), "CHANNELS": any(row >= 0 for row in rows), "BLOCK": BLOCK, "num_warps": WARPS}
    return (triton.cdiv(out.numel(), BLOCK),), (*tensors, *numbers), constants


@torch.library.custom_op("harmonica_rt::combine", mutates_args=(), device_types="cuda")
def combine(values: list[Tensor], weights: list[float], rows: list[int], channels: Tensor | None, inner: int) -> Tensor:
    """A new tensor; arguments as `combine_torch.combine_eager`'s, values contiguous.

    Values of other dtypes than the kernel's, float64 and complex ones, are added up by plain ops, which a graph holds
    as well.
    """
    if values[0].dtype not in DTYPES:
        return combine_eager(values, weights, rows, channels, inner)
    out = torch.empty_like(values[0])
    grid, arguments, constants = launch_arguments(out, values, weights, rows, channels, inner)
    with torch.cuda.device_of(out):  # Triton launches on the current device, wherever its arguments lie
        combine_kernel[grid](*arguments, **constants)
    return out


@combine.register_kernel("cpu")
def _(values, weights, rows, channels, inner):
    if values[0].dtype in DTYPES:
        launch_arguments(values[0], values, weights, rows, channels, inner)
    return combine_eager(values, weights, rows, channels, inner)


@combine.register_fake
def _(values, weights, rows, channels, inner):
    if values[0].dtype in DTYPES:
        launch_arguments(values[0], values, weights, rows, channels, inner)
    return torch.empty_like(values[0])
