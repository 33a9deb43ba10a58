"""Gap on a GPU: everything between two computed branches in one pass, as a Triton kernel.

    x <- x + sum_k weights[k] * gate_k * arena[slot_k]
    y  = norm(x) * scale + shift

x, y [batch, tokens, width]; arena [slots, batch, tokens, width]; rows [steps, batch, rows, width] holds the gates,
scales (1 + scale) and shifts of every step. A fresh Gap has 0 for the x on the right. The first `split` tokens of every
sample are one segment of the stream (text), the others another (image): gates, scales and shifts are given for each.
One storage dtype, fp32, fp16 or bf16, but rows may be fp32; sums and statistics in fp32. Terms are data: a table of
(slot, gate row in the first segment, in the second) and their weights, so that a schedule compiles nothing.

Imports triton: only the backends that run on a GPU import this file.
"""

from __future__ import annotations

from collections.abc import Sequence
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
NO_ROW = -1  # no gate, scale or shift
NO_TERM = -2  # instead of a gate: the term adds nothing to the segment, whose part of the slot is not read


# What varies from step to step, schedule to schedule and batch to batch must not make a new variant
@triton.jit(
    do_not_specialize=[
        *("terms", "tokens", "split", "total", "eps", "fresh"),
        *("shift_0", "shift_1", "scale_0", "scale_1"),
    ]
)
def gap_kernel(
    x_ptr,
    y_ptr,
    arena_ptr,
    rows_ptr,
    step_ptr,
    table_ptr,
    weights_ptr,
    terms,
    tokens,
    split,
    total,
    slot_stride,
    step_stride,
    sample_stride,
    shift_0,
    shift_1,
    scale_0,
    scale_1,
    eps,
    fresh,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1] rows of the stream
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < total) & (col < WIDTH)  # [ROWS, BLOCK]
    at = row.to(tl.int64) * WIDTH + col
    first = row % tokens < split  # [ROWS, 1] a program may hold rows of both segments, and of two samples
    sample = (row // tokens).to(tl.int64)
    modulation = rows_ptr + tl.load(step_ptr).to(tl.int64) * step_stride + sample * sample_stride + col

    x = tl.load(x_ptr + at, mask=mask & (fresh == 0), other=0.0).to(tl.float32)
    for k in range(terms):
        slot = tl.load(table_ptr + 3 * k).to(tl.int64)
        gate = tl.where(first, tl.load(table_ptr + 3 * k + 1), tl.load(table_ptr + 3 * k + 2))
        weight = tl.load(weights_ptr + k)
        value = tl.load(arena_ptr + slot * slot_stride + at, mask=mask & (gate > -2), other=0.0).to(tl.float32)
        gating = tl.load(modulation + gate * WIDTH, mask=mask & (gate >= 0), other=1.0).to(tl.float32)
        x += weight * (gating * value)
    if terms + fresh > 0:
        tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=mask)

    if NORM != "none":
        if NORM == "layer":
            centred = tl.where(mask, x - tl.sum(x, axis=1)[:, None] / WIDTH, 0.0)
        else:
            centred = tl.where(mask, x, 0.0)
        variance = tl.sum(centred * centred, axis=1)[:, None] / WIDTH
        y = centred * tl.rsqrt(variance + eps)
        scale = tl.where(first, scale_0, scale_1)
        shift = tl.where(first, shift_0, shift_1)
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
    return LaunchConfig(block, rows, warps=min(16, max(1, block * rows // 512)))


def gap_reference(
    x: Tensor,
    arena: Tensor,
    rows: Tensor,
    step: int,
    table: Sequence[tuple[int, int, int]],
    weights: Sequence[float],
    norm: Norm = "none",
    shift: tuple[int, int] = (NO_ROW, NO_ROW),
    scale: tuple[int, int] = (NO_ROW, NO_ROW),
    eps: float = 1e-6,
    split: int = 0,
    fresh: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x, y) in float64, segment by segment; y is x where there is no norm."""
    rows, done = rows[step].double()[:, :, None], []  # rows: [batch, rows, 1, width]
    for n, part in enumerate((slice(0, split), slice(split, None))):
        total = torch.zeros_like(x[:, part]).double() if fresh else x[:, part].double()
        for (slot, *gates), weight in zip(table, weights, strict=True):
            if gates[n] != NO_TERM:
                value = arena[slot, :, part].double()
                total = total + weight * (value if gates[n] == NO_ROW else rows[:, gates[n]] * value)
        y = total
        if norm == "layer":
            y = F.layer_norm(total, total.shape[-1:], eps=eps)
        elif norm == "rms":
            y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
        if norm != "none":
            y = y * rows[:, scale[n]] if scale[n] >= 0 else y
            y = y + rows[:, shift[n]] if shift[n] >= 0 else y
        done.append((total, y))
    return torch.cat([total for total, _ in done], 1), torch.cat([y for _, y in done], 1)


def launch_arguments(
    x: Tensor,
    y: Tensor,
    arena: Tensor,
    rows: Tensor,
    step: Tensor,
    table: Tensor,
    weights: Tensor,
    norm: str,
    shift: Sequence[int],
    scale: Sequence[int],
    eps: float,
    split: int = 0,
    fresh: bool = False,
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
    for name, pair in (("shift", shift), ("scale", scale)):
        assert len(pair) == 2 and all(NO_ROW <= row < rows.shape[2] for row in pair), (
            f"{name}: expected two rows, -1 to {rows.shape[2] - 1}, got {tuple(pair)}"
        )
    assert 0 <= split <= tokens, f"split: expected 0 to {tokens} tokens, got {split}"
    for name, tensor in (("y", y), ("arena", arena)):
        assert tensor.dtype == x.dtype, f"{name}: expected {x.dtype}, got {tensor.dtype}"
    assert rows.dtype in (x.dtype, torch.float32), f"rows: expected {x.dtype} or torch.float32, got {rows.dtype}"
    for name, tensor in (("x", x), ("y", y), ("arena", arena), ("rows", rows), ("table", table), ("weights", weights)):
        assert tensor.is_contiguous(), f"{name}: expected a contiguous tensor, got strides {tensor.stride()}"
        assert tensor.device == x.device, f"{name}: expected device {x.device}, got {tensor.device}"
    assert table.dtype == torch.int32 and table.ndim == 2 and table.shape[1] == 3, (
        f"table: expected int32 [terms, 3], got {table.dtype} {tuple(table.shape)}"
    )
    assert weights.dtype == torch.float32 and weights.shape == table.shape[:1], (
        f"weights: expected float32 [{len(table)}], got {weights.dtype} {tuple(weights.shape)}"
    )
    assert step.dtype == torch.int32 and step.numel() == 1, f"step: expected int32 [1], got {step.dtype} {step.shape}"
    config, total = launch_config(width), batch * tokens
    grid = (triton.cdiv(total, config.rows),)
    tensors = (x, y, arena, rows, step, table, weights)
    strides = (arena.stride(0), rows.stride(0), rows.stride(1))
    numbers = (len(table), tokens, split, total, *strides, *shift, *scale, eps, int(fresh))
    constants = {
        "WIDTH": width,
        "BLOCK": config.block,
        "ROWS": config.rows,
        "NORM": norm,
        "num_warps": config.warps,
    }
    return grid, (*tensors, *numbers), constants


def bytes_moved(
    x: Tensor,
    rows: Tensor,
    table: Tensor,
    norm: str,
    shift: Sequence[int],
    scale: Sequence[int],
    split: int = 0,
    fresh: bool = False,
) -> int:
    """Bytes of memory traffic of a launch, from its arguments; modulation rows, read by every token, count once."""
    batch, tokens, width = x.shape
    terms, read = len(table), set()
    streams = x.numel() * ((not fresh) + (terms > 0 or fresh) + (norm != "none"))
    for n, length in enumerate((split, tokens - split)):
        if length:
            gates = [gates[n] for _, *gates in table.tolist()]
            streams += batch * length * width * sum(gate != NO_TERM for gate in gates)
            read |= {*gates, *((shift[n], scale[n]) if norm != "none" else ())}
    modulation = batch * width * sum(row >= 0 for row in read)
    return x.element_size() * streams + rows.element_size() * modulation + 16 * terms + 4


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
    shift: Sequence[int],
    scale: Sequence[int],
    eps: float,
    split: int = 0,
    fresh: bool = False,
) -> None:
    """Add the terms of `table` to x and write the modulated norm of the sum to y, both in place.

    Args:
        x, y: [batch, tokens, width], contiguous. y is left alone where `norm` is "none".
        arena: [slots, batch, tokens, width], the values reused branches stand on.
        rows: [steps, batch, rows, width], modulation rows, of x's dtype or fp32; scale rows hold 1 + scale.
        step: int32 [1] on the device, which of `rows` holds now.
        table: int32 [terms, 3], of each term its slot, its gate row in the first segment and in the second. Instead of
            a row, -1: no gate; -2: the term adds nothing there, and that part of its slot is not read.
        weights: float32 [terms].
        norm: "none", "layer" or "rms", the same in both segments.
        shift, scale: the rows that modulate the norm in the first and in the second segment; -1 for none.
        split: tokens of the first segment. At 0 all are of the second, at `tokens` all of the first.
        fresh: x is 0 instead of what it holds, which is not read.
    """
    grid, arguments, constants = launch_arguments(
        x, y, arena, rows, step, table, weights, norm, shift, scale, eps, split, fresh
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever its arguments lie
        gap_kernel[grid](*arguments, **constants)


@gap.register_kernel("cpu")
def _(x, y, arena, rows, step, table, weights, norm, shift, scale, eps, split=0, fresh=False):
    launch_arguments(x, y, arena, rows, step, table, weights, norm, shift, scale, eps, split, fresh)
    now, terms = rows[int(step)].float()[:, :, None], list(zip(table.tolist(), weights.tolist()))
    for n, part in enumerate((slice(0, split), slice(split, None))):
        total = torch.zeros_like(x[:, part]).float() if fresh else x[:, part].float()
        for (slot, *gates), weight in terms:
            if (gate := gates[n]) != NO_TERM:
                value = arena[slot, :, part].float()
                total = total + weight * (value if gate == NO_ROW else now[:, gate] * value)
        if terms or fresh:
            x[:, part] = total
        if norm == "none":
            continue
        centred = total - total.mean(-1, keepdim=True) if norm == "layer" else total
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        normed = normed * now[:, scale[n]] if scale[n] >= 0 else normed
        y[:, part] = normed + now[:, shift[n]] if shift[n] >= 0 else normed


@gap.register_fake
def _(*operands: Any) -> None:
    launch_arguments(*operands)
