"""Which values a reused branch or output may stand on, and the unlearned weights: extrapolation through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .layout import TRUNK, Group, left_alone

ORDERS = (0, 1, 2)
FORECASTS = ("index", "timestep", "logsnr")  # what the forecast extrapolates over
STRONG_GUIDANCE = 3.0  # from here on a trunk that carries half of what is new in its input is nearer to the full run


def history(compute: np.ndarray, order: int) -> np.ndarray:
    """Steps at which the last `order + 1` values of every entry were computed, newest first, before each step.

    Args:
        compute: bool [T, ...].

    Returns:
        int [T, ..., order + 1]; -1 where no such value exists yet.
    """
    last = np.full((*compute.shape[1:], order + 1), -1)
    out = np.empty((*compute.shape, order + 1), dtype=last.dtype)
    for step, row in enumerate(compute):
        out[step] = last
        shifted = np.concatenate([np.full_like(last[..., :1], step), last[..., :-1]], axis=-1)
        last = np.where(row[..., None], shifted, last)
    return out


def log_snr(scheduler: Any) -> tuple[float, ...]:
    """log(alpha^2 / sigma^2) at each of the timesteps of a diffusers scheduler, which are set.

    Raises:
        ValueError: it has no table of them (flow matching).
    """
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"log-SNR: expected a scheduler with alphas_cumprod, got {type(scheduler).__name__}")
    alphas = np.asarray(scheduler.alphas_cumprod.tolist())
    table = np.log(alphas / (1 - alphas))
    return tuple(np.interp(scheduler.timesteps.tolist(), np.arange(len(table)), table).tolist())


def basis(at: np.ndarray, nodes: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """What a value at step `at` is of the values at `nodes`, by the polynomial through them.

    Args:
        at: int [...].
        nodes: int [..., values], -1 where there is none; polynomials are of as many as there are.
        positions: where each step is, float [T]; its number unless given.

    Returns:
        float64 [..., values], 0 where there is no node.
    """
    exists = nodes >= 0
    if positions is not None:
        at, nodes = positions[at], np.where(exists, positions[nodes], 0.0)
    weights = np.where(exists, 1.0, 0.0)
    for k in range(nodes.shape[-1]):
        for j in range(nodes.shape[-1]):
            if j != k:
                both = exists[..., k] & exists[..., j]
                gap = np.where(both, nodes[..., k] - nodes[..., j], 1)
                weights[..., k] *= np.where(both, (at - nodes[..., j]) / gap, 1.0)
    return weights


def forecast(compute: np.ndarray, order: int, positions: np.ndarray | None = None) -> np.ndarray:
    """The unlearned reuse weights: polynomial extrapolation through the values that exist.

    Order 1 is o = c1 + w (c1 - c2), w = (i - i1) / (i1 - i2); with fewer values than the order needs, the order drops.

    Args:
        compute: bool [T, ...].
        positions: as in `basis`.

    Returns:
        float64 [T, ..., order + 1], 0 where computed and for values that do not exist yet.
    """
    weights = basis(over_entries(np.arange(len(compute)), compute), history(compute, order), positions)
    return np.where(compute[..., None], 0.0, weights) + 0.0  # no negative zeros


def unlearned(
    compute: np.ndarray,
    output: np.ndarray,
    groups: Sequence[Group],
    order: int,
    positions: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The forecast's weights of entries [T, ..., order + 1] and of outputs [T, order + 1], 0 where neither is reused.

    Args:
        compute: bool [T, ...].
        output, groups: as in `layout.left_alone`.
        positions: as in `basis`.
    """
    entries = np.where(left_alone(compute, output, groups)[..., None], 0.0, forecast(compute, order, positions))
    return entries, forecast(~output, order, positions)


def unlearned_carry(groups: Sequence[Group], order: int, guidance_scale: float | None) -> float:
    """What reused streams carry on beside the forecast's weights (`bench/WHICH_LEVEL.md`)."""
    if TRUNK not in [group.name for group in groups]:
        return 1.0
    return 0.5 if order > 0 and (guidance_scale or 0.0) >= STRONG_GUIDANCE else 0.0


def over_entries(steps: np.ndarray, compute: np.ndarray) -> np.ndarray:
    """[T] as [T, 1, ...], to stand beside `compute`."""
    return steps.reshape(-1, *(1,) * (compute.ndim - 1))
