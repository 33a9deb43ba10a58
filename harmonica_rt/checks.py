"""What a `Schedule` refuses: a check returns the value as it is kept, or raises naming what was expected and came."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .forecast import FORECASTS, history


def positive(name: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return int(value)


def finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def check_compute(compute: Any, branches: int) -> np.ndarray:
    compute = np.asarray(compute)
    if compute.dtype != np.bool_:
        raise TypeError(f"compute: expected dtype bool, got {compute.dtype}")
    if compute.ndim != 3 or compute.shape[2] != branches or 0 in compute.shape:
        raise ValueError(f"compute: expected shape [steps, layers, {branches} branches], got {list(compute.shape)}")
    if not compute[0].all():
        layer, branch = np.argwhere(~compute[0])[0]
        raise ValueError(
            f"compute: step 0 must compute every branch, but layer {layer}, branch {branch} is reused there "
            "(nothing is cached yet)"
        )
    return compute


def check_output(output: Any, compute: np.ndarray) -> np.ndarray:
    output = np.asarray(output)
    if output.dtype != np.bool_ or output.shape != compute.shape[:1]:
        raise ValueError(f"output: expected bool [{len(compute)}], got {output.dtype} {list(output.shape)}")
    if output[0]:
        raise ValueError("output: step 0 must compute, but its output is reused (nothing is cached yet)")
    if (bad := output & compute.any((1, 2))).any():
        step = int(np.argmax(bad))
        raise ValueError(
            f"output: step {step} reuses the output: expected no branch computed there, got {compute[step].sum()}"
        )
    return output


def check_output_weights(weights: Any, output: np.ndarray, order: int) -> np.ndarray:
    weights = check_numbers("output_weights", weights, (len(output), order + 1))
    allowed = output[:, None] & (history(~output[:, None, None], order)[:, 0, 0] >= 0)
    if (bad := (weights != 0) & ~allowed).any():
        step, value = np.argwhere(bad)[0]
        why = "that output does not exist yet" if output[step] else "that step does not reuse its output"
        raise ValueError(
            f"output_weights: expected 0 at step {step}, value {value} ({why}), got {weights[step, value]}"
        )
    return weights


def check_numbers(name: str, weights: Any, expected: tuple[int, ...]) -> np.ndarray:
    weights = np.asarray(weights)
    if not np.issubdtype(weights.dtype, np.floating):
        raise TypeError(f"{name}: expected a float dtype, got {weights.dtype}")
    if weights.shape != expected:
        raise ValueError(
            f"{name}: expected shape {list(expected)} for order {expected[-1] - 1}, got {list(weights.shape)}"
        )
    weights = weights.astype(np.float64) + 0.0
    if not (finite := np.abs(weights) <= np.finfo(np.float32).max).all():
        where = np.argwhere(~finite)[0]
        raise ValueError(f"{name}: expected finite numbers, got {weights[tuple(where)]} at {_place(where)}")
    return weights


def check_weights(weights: Any, compute: np.ndarray, output: np.ndarray, order: int) -> np.ndarray:
    weights = check_numbers("weights", weights, (*compute.shape, order + 1))
    if (bad := (weights != 0) & output[:, None, None, None]).any():
        where = np.argwhere(bad)[0]
        raise ValueError(
            f"weights: expected 0 where the output is reused, got {weights[tuple(where)]} at {_place(where)}"
        )
    if (bad := (weights != 0) & compute[..., None]).any():
        where = np.argwhere(bad)[0]
        raise ValueError(
            f"weights: expected 0 where a branch is computed, got {weights[tuple(where)]} at {_place(where)}"
        )
    if (bad := (weights != 0) & (history(compute, order) < 0)).any():
        where = np.argwhere(bad)[0]
        raise ValueError(
            f"weights: value {where[3]} (0 = newest) does not exist yet at {_place(where)}: "
            f"expected 0, got {weights[tuple(where)]}"
        )
    return weights


def _place(where: np.ndarray) -> str:
    names = ("step", "layer", "branch") if len(where) > 2 else ("step",)
    return ", ".join(f"{name} {i}" for name, i in zip(names, where))


def check_positions(forecast: Any, timesteps: Any, log_snr: Any) -> np.ndarray | None:
    """Where each step is for the forecast, float [T]; None for its number."""
    if forecast not in FORECASTS:
        raise ValueError(f"forecast: expected one of {FORECASTS}, got {forecast!r}")
    if forecast == "index":
        return None
    name, values = ("timesteps", timesteps) if forecast == "timestep" else ("log_snr", log_snr)
    if values is None:
        raise ValueError(f"forecast {forecast!r}: expected {name}, got none")
    if len(set(values)) != len(values):
        twice = next(v for i, v in enumerate(values) if v in values[:i])
        raise ValueError(f"forecast {forecast!r}: expected distinct {name}, got {twice:g} twice")
    return np.array(values)


def check_timesteps(timesteps: Any, steps: int, name: str = "timesteps") -> tuple[float, ...]:
    if hasattr(timesteps, "tolist"):  # a scheduler's are a tensor
        timesteps = timesteps.tolist()
    try:
        values = tuple(timesteps)
    except TypeError:
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(timesteps).__name__}") from None
    values = tuple(finite(name, t) for t in values)
    if len(values) != steps:
        raise ValueError(f"{name}: expected {steps} (one a step), got {len(values)}")
    return values
