"""Gap on a GPU: everything between two computed branches in one pass, as a Triton kernel.

    x <- x + sum_k weights[k] * gate_k * arena[slot_k]
    y  = norm(x) * scale + shift

x, y [batch, tokens, width]; arena [slots, batch, tokens, width]; rows [steps, batch, rows, width] holds the gates,
scales (1 + scale) and shifts of every step. One storage dtype, fp32, fp16 or bf16; sums and statistics in fp32. Terms
are data: a table of (slot, gate row or -1 for no gate) and their weights, so that a schedule compiles nothing.

Imports triton: only the backends that run on a GPU import this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 8192
NORMS = ("none", "layer", "rms")
Norm = Literal["none", "layer", "rms"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# What varies from step to step, schedule to schedule and batch to batch must not make a new variant
@triton.jit(do_not_specialize=["terms", "tokens", "total", "shift", "scale", "eps"])
def gap_kernel(
    x_ptr,
    y_ptr,
    arena_ptr,
    rows_ptr,
    step_ptr,
    table_ptr,
    weights_ptr,
    affine_ptr,
    terms,
    tokens,
    total,
    slot_stride,
    step_stride,
    sample_stride,
    shift,
    scale,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS] rows of the stream
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < total)[:, None] & (col < WIDTH)  # [ROWS, BLOCK]
    at = row.to(tl.int64)[:, None] * WIDTH + col
    sample = (row // tokens).to(tl.int64)[:, None]
    modulation = rows_ptr + tl.load(step_ptr).to(tl.int64) * step_stride + sample * sample_stride + col

    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for k in range(terms):
        slot = tl.load(table_ptr + 2 * k).to(tl.int64)
        gate = tl.load(table_ptr + 2 * k + 1)
        weight = tl.load(weights_ptr + k)
        value = tl.load(arena_ptr + slot * slot_stride + at, mask=mask, other=0.0).to(tl.float32)
        gating = tl.load(modulation + gate * WIDTH, mask=mask & (gate >= 0), other=1.0).to(tl.float32)
        x += weight * (gating * value)
    if terms > 0:
        tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)

    if NORM != "none":
        if NORM == "layer":
            centred = tl.where(mask, x - tl.sum(x, axis=1)[:, None] / WIDTH, 0.0)
        else:
            centred = tl.where(mask, x, 0.0)
        variance = tl.sum(centred * centred, axis=1)[:, None] / WIDTH
        y = centred * tl.rsqrt(variance + eps)
        if AFFINE:
            inside = col < WIDTH
            y *= tl.load(affine_ptr + col, mask=inside, other=0.0).to(tl.float32)
            y += tl.load(affine_ptr + WIDTH + col, mask=inside, other=0.0).to(tl.float32)
        y *= tl.load(modulation + scale * WIDTH, mask=mask & (scale >= 0), other=1.0).to(tl.float32)
        y += tl.load(modulation + shift * WIDTH, mask=mask & (shift >= 0), other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class LaunchConfig:
    """Block of columns, rows a program takes, warps. A function of the width alone: no autotuning, no surprise."""

    block: int
    rows: int
    warps: int


def launch_config(width: int) -> LaunchConfig:
    """A warp reads 512 to 1024 columns; narrow streams share a program, so that none is nearly empty."""
    block = max(32, triton.next_power_of_2(width))
    rows = max(1, 1024 // block)
    return LaunchConfig(block, rows, warps=min(8, max(1, block * rows // 512)))


def gap_reference(
    x: Tensor,
    arena: Tensor,
    rows: Tensor,
    step: int,
    table: list[tuple[int, int]],
    weights: list[float],
    norm: Norm = "none",
    shift: int = -1,
    scale: int = -1,
    eps: float = 1e-6,
    affine: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x, y) in float64; y is x where there is no norm."""
    x, rows = x.double(), rows[step].double()[:, :, None]  # rows: [batch, rows, 1, width]
    for (slot, gate), weight in zip(table, weights, strict=True):
        value = arena[slot].double()
        x = x + weight * (value if gate < 0 else rows[:, gate] * value)
    y = x
    if norm == "layer":
        y = F.layer_norm(x, x.shape[-1:], eps=eps)
    elif norm == "rms":
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if norm != "none":
        if affine is not None:
            y = y * affine[0].double() + affine[1].double()
        y = y * rows[:, scale] if scale >= 0 else y
        y = y + rows[:, shift] if shift >= 0 else y
    return x, y


def launch_arguments(
    x: Tensor,
    y: Tensor,
    arena: Tensor,
    rows: Tensor,
    step: Tensor,
    table: Tensor,
    weights: Tensor,
    norm: str,
    shift: int,
    scale: int,
    eps: float,
    affine: Tensor | None = None,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, positional and constant arguments of a launch, checked."""
    batch, tokens, width = x.shape
    assert norm in NORMS, f"norm: expected one of {NORMS}, got {norm!r}"
    assert x.dtype in DTYPES, f"x: expected one of {DTYPES}, got {x.dtype}"
    assert width <= MAX_WIDTH, f"width: expected at most {MAX_WIDTH}, got {width}"
    assert y.shape == x.shape, f"y: expected shape {tuple(x.shape)}, got {tuple(y.shape)}"
    assert arena.shape[1:] == x.shape, f"arena: expected [slots, {batch}, {tokens}, {width}], got {tuple(arena.shape)}"
    assert rows.ndim == 4 and rows.shape[1] == batch and rows.shape[3] == width, (
        f"rows: expected [steps, {batch}, rows, {width}], got {tuple(rows.shape)}"
    )
    assert -1 <= shift < rows.shape[2] and -1 <= scale < rows.shape[2], (
        f"shift, scale: expected -1 to {rows.shape[2] - 1}, got {shift}, {scale}"
    )
    for name, tensor in (("y", y), ("arena", arena), ("rows", rows)):
        assert tensor.dtype == x.dtype, f"{name}: expected {x.dtype}, got {tensor.dtype}"
    for name, tensor in (("x", x), ("y", y), ("arena", arena), ("rows", rows), ("table", table), ("weights", weights)):
        assert tensor.is_contiguous(), f"{name}: expected a contiguous tensor, got strides {tensor.stride()}"
        assert tensor.device == x.device, f"{name}: expected device {x.device}, got {tensor.device}"
    assert table.dtype == torch.int32 and table.ndim == 2 and table.shape[1] == 2, (
        f"table: expected int32 [terms, 2], got {table.dtype} {tuple(table.shape)}"
    )
    assert weights.dtype == torch.float32 and weights.shape == table.shape[:1], (
        f"weights: expected float32 [{len(table)}], got {weights.dtype} {tuple(weights.shape)}"
    )
    assert step.dtype == torch.int32 and step.numel() == 1, f"step: expected int32 [1], got {step.dtype} {step.shape}"
    if affine is not None:
        assert affine.shape == (2, width) and affine.is_contiguous(), (
            f"affine: expected contiguous [2, {width}] (weight, bias), got {tuple(affine.shape)}"
        )
    config, total = launch_config(width), batch * tokens
    grid = (triton.cdiv(total, config.rows),)
    tensors = (x, y, arena, rows, step, table, weights, x if affine is None else affine)
    numbers = (len(table), tokens, total, arena.stride(0), rows.stride(0), rows.stride(1), shift, scale, eps)
    constants = {
        "WIDTH": width,
        "BLOCK": config.block,
        "ROWS": config.rows,
        "NORM": norm,
        "AFFINE": affine is not None,
        "num_warps": config.warps,
    }
    return grid, (*tensors, *numbers), constants


def bytes_moved(
    x: Tensor, rows: Tensor, table: Tensor, norm: str, shift: int, scale: int, affine: Tensor | None
) -> int:
    """Bytes of memory traffic of a launch, from its arguments; modulation rows, read by every token, count once."""
    size, terms = x.element_size(), len(table)
    streams = x.numel() * (1 + terms + (terms > 0) + (norm != "none"))
    gates = len({gate for _, gate in table.tolist() if gate >= 0})
    modulation = len(x) * x.shape[2] * (gates + (norm != "none") * ((shift >= 0) + (scale >= 0)))
    constants = 2 * x.shape[2] if affine is not None else 0
    return size * (streams + modulation + constants) + 12 * terms + 4


@torch.library.custom_op("harmonica_rt::gap", mutates_args=("x", "y"), device_types="cuda")
def gap(
    x: Tensor,
    y: Tensor,
    arena: Tensor,
    rows: Tensor,
    step: Tensor,
    table: Tensor,
    weights: Tensor,
    norm: str,
    shift: int,
    scale: int,
    eps: float,
    affine: Tensor | None = None,
) -> None:
    """Add the terms of `table` to x and write the modulated norm of the sum to y, both in place.

    Args:
        x, y: [batch, tokens, width], contiguous. y is left alone where `norm` is "none".
        arena: [slots, batch, tokens, width], the values reused branches stand on.
        rows: [steps, batch, rows, width], modulation rows; scale rows hold 1 + scale.
        step: int32 [1] on the device, which of `rows` holds now.
        table: int32 [terms, 2], slot and gate row (-1: no gate) of each term.
        weights: float32 [terms].
        norm: "none", "layer" or "rms".
        shift, scale: rows that modulate the norm; -1 for none.
        affine: [2, width], weight and bias of the norm, or None.
    """
    grid, arguments, constants = launch_arguments(
        x, y, arena, rows, step, table, weights, norm, shift, scale, eps, affine
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever its arguments lie
        gap_kernel[grid](*arguments, **constants)


@gap.register_kernel("cpu")
def _(x, y, arena, rows, step, table, weights, norm, shift, scale, eps, affine=None):
    launch_arguments(x, y, arena, rows, step, table, weights, norm, shift, scale, eps, affine)
    now = rows[int(step)].float()[:, :, None]
    total = x.float()
    for (slot, gate), weight in zip(table.tolist(), weights.tolist()):
        value = arena[slot].float()
        total = total + weight * (value if gate < 0 else now[:, gate] * value)
    if len(table):
        x.copy_(total)
    if norm == "none":
        return
    centred = total - total.mean(-1, keepdim=True) if norm == "layer" else total
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if affine is not None:
        normed = normed * affine[0].float() + affine[1].float()
    normed = normed * now[:, scale] if scale >= 0 else normed
    y.copy_(normed + now[:, shift] if shift >= 0 else normed)


@gap.register_fake
def _(*operands: Any) -> None:
    launch_arguments(*operands)
