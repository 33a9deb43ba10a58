"""Which values a reused branch or output may stand on, and the unlearned weights: extrapolation through them."""

from __future__ import annotations

import numpy as np

ORDERS = (0, 1, 2)


def history(compute: np.ndarray, order: int) -> np.ndarray:
    """Steps at which the last `order + 1` values of every entry were computed, newest first, before each step.

    Args:
        compute: bool [T, L, B].

    Returns:
        int [T, L, B, order + 1]; -1 where no such value exists yet.
    """
    last = np.full((*compute.shape[1:], order + 1), -1)
    out = np.empty((*compute.shape, order + 1), dtype=last.dtype)
    for step, row in enumerate(compute):
        out[step] = last
        shifted = np.concatenate([np.full_like(last[..., :1], step), last[..., :-1]], axis=-1)
        last = np.where(row[..., None], shifted, last)
    return out


def forecast(compute: np.ndarray, order: int) -> np.ndarray:
    """The unlearned reuse weights: polynomial extrapolation over the step index through the values that exist.

    Order 1 is o = c1 + w (c1 - c2), w = (i - i1) / (i1 - i2); with fewer values than the order needs, the order drops.

    Args:
        compute: bool [T, L, B].

    Returns:
        float64 [T, L, B, order + 1], 0 where computed and for values that do not exist yet.
    """
    nodes = history(compute, order)
    exists = nodes >= 0
    at = np.arange(len(compute)).reshape(-1, 1, 1)
    weights = np.where(exists & ~compute[..., None], 1.0, 0.0)
    for k in range(order + 1):
        for j in range(order + 1):
            if j != k:
                both = exists[..., k] & exists[..., j]
                gap = np.where(both, nodes[..., k] - nodes[..., j], 1)
                weights[..., k] *= np.where(both, (at - nodes[..., j]) / gap, 1.0)
    return weights + 0.0  # no negative zeros


def unlearned(compute: np.ndarray, output: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The forecast's weights of branches [T, L, B, order + 1] and of outputs [T, order + 1], 0 where neither is reused.

    Args:
        compute: bool [T, L, B].
        output: bool [T]; such steps leave the branches alone.
    """
    branches = np.where(output[:, None, None, None], 0.0, forecast(compute, order))
    return branches, forecast(~output[:, None, None], order)[:, 0, 0]
