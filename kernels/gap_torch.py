"""Gap: everything between two computed branches in one pass.

    x <- x + sum_k weights[k] * gates[k] * slots[k]
    y  = layer_norm(x) * scale + shift        (if a norm follows; scale already holds 1 + scale)

Shapes: x, y, slots[k] [batch, tokens, width]; gates[k], scale, shift [batch, 1, width]; weights fp32 [K].
Storage is fp32, fp16 or bf16, the same for all but the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .inductor import compile_graph

CHUNKS = (8, 4, 2, 1)  # terms one compiled variant adds: 8 variants serve every schedule


def gap_reference(
    x: Tensor,
    slots: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    weights: Sequence[float],
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(x, y) in float64; `norm` is (shift, scale, eps), a gate of None is 1."""
    x = x.double()
    for slot, gate, weight in zip(slots, gates, weights, strict=True):
        x = x + weight * (1.0 if gate is None else gate.double()) * slot.double()
    if norm is None:
        return x, None
    shift, scale, eps = norm
    return x, F.layer_norm(x, x.shape[-1:], eps=eps) * scale.double() + shift.double()


def gap_eager(
    x: Tensor,
    slots: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    weights: Sequence[float],
    norm: tuple[Tensor, Tensor, float] | None,
) -> tuple[Tensor, Tensor]:
    """(x, y) by plain torch ops, in place on x: one op a term, two for the norm. Without a norm y is x."""
    for slot, gate, weight in zip(slots, gates, weights):
        if gate is None:
            x.add_(slot, alpha=weight)
        else:
            x.addcmul_(slot, gate, value=weight)
    if norm is None:
        return x, x
    shift, scale, eps = norm
    return x, torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)


def chunks(terms: int) -> list[int]:
    """How many terms each launch of a compiled Gap adds; the last launch also norms. [0] if there are none."""
    sizes = []
    for size in CHUNKS:
        sizes += [size] * ((terms - sum(sizes)) // size)
    return sizes or [0]


@lru_cache(maxsize=256)
def compiled_gap(
    terms: int,
    norm: bool,
    shape: tuple[int, int, int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
) -> Callable[..., list[Tensor]]:
    """A Gap of so many terms as one compiled kernel: (x, scalars, *slots, *gates) -> [x].

    With `norm`: (x, scalars, *slots, *gates, shift, scale) -> [x, y], or [y] if there are no terms. `scalars` are the
    weights, then eps, in fp32. All that varies between steps, layers and schedules is an argument, so a variant is
    compiled once per shape.

    Args:
        shape: of x, [batch, tokens, width].
        rows: modulation rows a sample has; gates, shift and scale are views of [batch, rows, width].
        threads: torch.get_num_threads(), which the kernel is compiled for.
    """

    def gap(x: Tensor, scalars: Tensor, *operands: Tensor) -> list[Tensor]:
        total = x.float()
        for k in range(terms):
            total = total + scalars[k] * (operands[terms + k].float() * operands[k].float())
        moved = [total.to(x.dtype)] if terms else []
        if not norm:
            return moved
        shift, scale = operands[2 * terms :]
        variance, mean = torch.var_mean(total, dim=-1, correction=0, keepdim=True)
        y = (total - mean) * torch.rsqrt(variance + scalars[terms]) * scale.float() + shift.float()
        return [*moved, y.to(x.dtype)]

    batch, _, width = shape

    def stream() -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def row() -> Tensor:
        return torch.empty(batch, rows, width, dtype=dtype, device=device)[:, :1]

    scalars = torch.empty(terms + 1, dtype=torch.float32, device=device)
    streams, gates = [stream() for _ in range(terms)], [row() for _ in range(terms)]
    return compile_graph(gap, [stream(), scalars, *streams, *gates, *([row(), row()] if norm else [])])
