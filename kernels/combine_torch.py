"""The weighted sum that stands in for a reused value, by plain torch ops.

    o = sum_k weights[k] * values[k]            weights[k] a number, or one for each channel

Values are alike, fp32, fp16 or bf16 (fp64 too, here); sums in fp32, rounded once. Channels are rows of a table,
[rows, channels] fp32; `inner` elements of a value follow one another on the same channel: 1 where channels are its last
axis, height * width where they are a picture's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine_reference(
    values: Sequence[Tensor], weights: Sequence[float], rows: Sequence[int], channels: Tensor | None, inner: int
) -> Tensor:
    """The sum in float64."""
    total = torch.zeros(values[0].shape, dtype=torch.float64)
    for value, weight, row in zip(values, weights, rows, strict=True):
        value = value.double()
        total += weight * value if row < 0 else _over(value, _row(channels, row).double(), inner)
    return total


def combine_eager(
    values: Sequence[Tensor], weights: Sequence[float], rows: Sequence[int], channels: Tensor | None, inner: int
) -> Tensor:
    """A new tensor.

    Args:
        values: at least one tensor; all of one shape, dtype and device.
        weights: as many numbers.
        rows: for each the number of the row of `channels` in its place, or -1.
        channels: float32 [rows, channels], or None.
        inner: elements of a value before the next channel.
    """
    kind = torch.promote_types(values[0].dtype, torch.float32)
    total = torch.zeros(values[0].shape, dtype=kind, device=values[0].device)
    for value, weight, row in zip(values, weights, rows, strict=True):
        if row < 0:
            total.add_(value, alpha=weight)
        else:
            total.add_(_over(value.to(kind), _row(channels, row).to(kind), inner))
    return total.to(values[0].dtype)


def _row(channels: Tensor | None, row: int) -> Tensor:
    assert channels is not None, "weights per channel are of a table"
    return channels[row]


def _over(value: Tensor, row: Tensor, inner: int) -> Tensor:
    """`value` times [channels]."""
    return (value.reshape(-1, len(row), inner) * row[:, None]).view(value.shape)
