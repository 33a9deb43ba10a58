"""The weighted sum that stands in for a reused value: o = sum_k weights[k] * values[k]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(values: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """A new tensor, summed in float32 (float64 if the values are) and rounded once.

    Args:
        values: at least one tensor; all of one shape, dtype and device.
        weights: as many numbers, or float32 tensors that broadcast with the values: weights per channel.
    """
    first, kind = values[0], torch.promote_types(values[0].dtype, torch.float32)
    total = first.to(kind) * weights[0]
    for value, weight in zip(values[1:], weights[1:]):
        if isinstance(weight, Tensor):
            total.addcmul_(value, weight) if value.dtype == kind else total.add_(value.to(kind) * weight)
        else:
            total.add_(value, alpha=weight)
    return total.to(first.dtype)
