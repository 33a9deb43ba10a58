"""Gap: everything between two computed branches in one pass.

    x <- x + sum_k weights[k] * gates[k] * slots[k]
    y  = norm(x) * scale + shift        (if a norm follows, layer or rms; scale already holds 1 + scale)

Shapes: x, y, slots[k] [batch, tokens, width]; gates[k], scale, shift [batch, 1, width]; weights fp32 [K]. The first
`split` tokens may be one segment of the stream (text) and the others another (image): a row is then a pair of rows.
Storage is fp32, fp16 or bf16, the same for all but the weights; rows may be fp32 beside any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .inductor import compile_graph

MOST = 8  # terms one compiled variant adds


NOTHING = 0  # instead of a gate: the term adds nothing to the segment

Row = Tensor | None  # [batch, 1, width]; None: a gate or scale of 1, a shift of 0
Gate = Row | Literal[0] | tuple[Row | Literal[0], Row | Literal[0]]  # of the stream, or of its two segments
Modulation = Row | tuple[Row, Row]
Norm = tuple[Modulation, Modulation, float]  # shift, scale, eps
Kind = Literal["layer", "rms"]


def gap_reference(
    x: Tensor,
    slots: Sequence[Tensor],
    gates: Sequence[Gate],
    weights: Sequence[float],
    norm: Norm | None = None,
    split: int = 0,
    kind: Kind = "layer",
) -> tuple[Tensor, Tensor | None]:
    """(x, y) in float64, token by token."""

    def every(row: Gate, default: float) -> Tensor:  # [batch, tokens, width]
        pair = row if isinstance(row, tuple) else (row, row)
        first, second = (torch.full_like(x, default) if r is None else r + torch.zeros_like(x) for r in pair)
        return torch.where(torch.arange(x.shape[1], device=x.device)[:, None] < split, first, second)

    x = x.double()
    for slot, gate, weight in zip(slots, gates, weights, strict=True):
        gating = every(gate, 1.0)
        x = x + torch.where(gating == 0, 0.0, weight * gating * slot.double())
    if norm is None:
        return x, None
    shift, scale, eps = norm
    return x, _normed(x, kind, eps) * every(scale, 1.0) + every(shift, 0.0)


def gap_eager(
    x: Tensor,
    slots: Sequence[Tensor],
    gates: Sequence[Gate],
    weights: Sequence[float],
    norm: Norm | None,
    split: int = 0,
    kind: Kind = "layer",
) -> tuple[Tensor, Tensor]:
    """(x, y) by plain torch ops, in place on x. Without a norm y is x.

    One op a term, two for the norm. A pair of rows costs an op more, so what both segments share is better given once;
    a segment a term adds nothing to costs none, and its part of the slot is not read. Rows of another dtype than x have
    the norm computed in theirs, which costs a cast.

    Args:
        split: tokens of the first segment, to which the first row of a pair belongs.
        kind: of the norm, "layer" or "rms".
    """
    for slot, gate, weight in zip(slots, gates, weights):
        _add(x, slot, gate, weight, split)
    if norm is None:
        return x, x
    shift, scale, eps = norm
    rows = next((r for m in (shift, scale) for r in _pair(m) if r is not None), x)
    normed = _normed(x.to(rows.dtype), kind, eps)
    if not isinstance(shift, tuple) and not isinstance(scale, tuple) and normed.dtype == x.dtype:
        return x, _modulated(normed, shift, scale)
    y = normed if normed.dtype == x.dtype else torch.empty_like(x)
    for part, out, own_shift, own_scale in zip(_cut(normed, split), _cut(y, split), _pair(shift), _pair(scale)):
        _modulated(part, own_shift, own_scale, out=out)
    return x, y


def _add(x: Tensor, slot: Tensor, gate: Gate, weight: float, split: int) -> None:
    if gate is None:
        x.add_(slot, alpha=weight)
    elif isinstance(gate, Tensor):
        x.addcmul_(slot, gate, value=weight)
    elif isinstance(gate, tuple):
        for part, value, row in zip(_cut(x, split), _cut(slot, split), gate):
            _add(part, value, row, weight, 0)


def _normed(x: Tensor, kind: Kind, eps: float) -> Tensor:
    return (F.layer_norm if kind == "layer" else F.rms_norm)(x, x.shape[-1:], eps=eps)


def _modulated(normed: Tensor, shift: Row, scale: Row, out: Tensor | None = None) -> Tensor:
    if shift is not None and scale is not None:
        return torch.addcmul(shift, normed, scale, out=out)
    if scale is not None:
        return torch.mul(normed, scale, out=out)
    if shift is not None:
        return torch.add(normed, shift, out=out)
    return normed if out is None or out is normed else out.copy_(normed)


def _pair(row: Modulation) -> tuple[Row, Row]:
    return row if isinstance(row, tuple) else (row, row)


def _cut(stream: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Both segments of [batch, tokens, width], as views."""
    return stream.narrow(1, 0, split), stream.narrow(1, split, stream.shape[1] - split)


def chunks(terms: int) -> list[int]:
    """How many terms each launch of a compiled Gap adds: `MOST`, the last one what is left, and it also norms.

    A launch reads and writes the stream, so that there are as few as can be.
    """
    return [MOST] * ((terms - 1) // MOST) + [terms - MOST * ((terms - 1) // MOST)] if terms else [0]


@lru_cache(maxsize=256)
def compiled_gap(
    terms: int,
    norm: bool,
    shape: tuple[int, int, int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    split: int | None = None,
    rows_dtype: torch.dtype | None = None,
    kind: Kind = "layer",
) -> Callable[..., list[Tensor]]:
    """A Gap of so many terms as one compiled kernel: (x, scalars, *slots, *gates) -> [x].

    With `norm`: (x, scalars, *slots, *gates, shift, scale) -> [x, y], or [y] if there are no terms. `scalars` are the
    weights, then eps, in fp32. All that varies between steps, layers and schedules is an argument, so a variant is
    compiled once per shape.

    With `split` there are two segments, and all rows of the first are followed by all of the second: (x, scalars,
    *slots, *gates, shift, scale, *gates, shift, scale). Every row is a tensor: ones where there is no gate or scale,
    zeros where there is no shift or where a term adds nothing, and there its slot must be finite.

    Args:
        shape: of x, [batch, tokens, width].
        rows: modulation rows a sample has; gates, shift and scale are views of [batch, rows, width].
        threads: torch.get_num_threads(), which the kernel is compiled for.
        split: tokens of the first segment, 0 to tokens; None: rows are given once, for all tokens.
        rows_dtype: of gates, shift and scale, if it is not `dtype`.
        kind: of the norm, "layer" or "rms".
    """

    def gap(x: Tensor, scalars: Tensor, slots: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
        total = x.float()
        for k in range(terms):
            total = total + scalars[k] * (rows[k].float() * slots[k].float())
        moved = [total.to(x.dtype)] if terms else []
        if not norm:
            return moved
        shift, scale = rows[terms:]
        if kind == "layer":
            variance, mean = torch.var_mean(total, dim=-1, correction=0, keepdim=True)
            total = total - mean
        else:
            variance = total.square().mean(-1, keepdim=True)
        y = total * torch.rsqrt(variance + scalars[terms]) * scale.float() + shift.float()
        return [*moved, y.to(x.dtype)]

    batch, tokens, width = shape
    given = terms + 2 * norm  # rows of a segment

    def segments(x: Tensor, scalars: Tensor, *operands: Tensor) -> list[Tensor]:
        slots, first, second = operands[:terms], operands[terms : terms + given], operands[-given:]
        if split in (None, 0, tokens):
            return gap(x, scalars, slots, first if split == tokens else second)
        # A loop for each segment: choosing rows by token within one loop took 1.15 times as long at 8 terms on a CPU
        cuts = zip(*(_cut(tensor, split) for tensor in (x, *slots)))
        parts = [gap(part, scalars, values, rows) for (part, *values), rows in zip(cuts, (first, second))]
        return [torch.cat(both, 1) for both in zip(*parts)]

    def stream() -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def row() -> Tensor:
        return torch.empty(batch, rows, width, dtype=rows_dtype or dtype, device=device)[:, :1]

    scalars = torch.empty(terms + 1, dtype=torch.float32, device=device)
    each = given if split is None else 2 * given
    return compile_graph(
        segments, [stream(), scalars, *(stream() for _ in range(terms)), *(row() for _ in range(each))]
    )
