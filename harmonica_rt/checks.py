"""What a `Schedule` refuses: a check returns the value as it is kept, or raises naming what was expected and came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .forecast import FORECASTS, history
from .layout import Group, left_alone, shape_of_entries, trunk_beside


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


def check_compute(compute: Any, groups: Sequence[Group]) -> np.ndarray:
    compute = np.asarray(compute)
    if compute.dtype != np.bool_:
        raise TypeError(f"compute: expected dtype bool, got {compute.dtype}")
    shape = shape_of_entries(groups)
    if compute.shape[1:] != shape or not len(compute):
        expected = f"[steps, {shape[0]} entries]"
        if len(groups) == 1:
            same = compute.ndim == 3 and compute.shape[2] == shape[1] and 0 not in compute.shape
            expected = f"[steps, {f'{shape[0]} layers' if same else 'layers'}, {shape[1]} branches]"
        raise ValueError(f"compute: expected shape {expected}, got {list(compute.shape)}")
    if not compute[0].all():
        where = ", ".join(f"{name} {i}" for name, i in zip(_axes(compute), np.argwhere(~compute[0])[0]))
        raise ValueError(
            f"compute: step 0 must compute every branch, but {where} is reused there (nothing is cached yet)"
        )
    if trunk_beside(groups) and (bad := ~compute[:, -1] & compute.any(1)).any():
        step = int(np.argmax(bad))
        raise ValueError(
            f"compute: step {step} reuses the trunk: expected no branch computed there, got {compute[step].sum()}"
        )
    return compute


def check_output(output: Any, compute: np.ndarray) -> np.ndarray:
    output = np.asarray(output)
    if output.dtype != np.bool_ or output.shape != compute.shape[:1]:
        raise ValueError(f"output: expected bool [{len(compute)}], got {output.dtype} {list(output.shape)}")
    if output[0]:
        raise ValueError("output: step 0 must compute, but its output is reused (nothing is cached yet)")
    if (bad := output & compute.reshape(len(compute), -1).any(1)).any():
        step = int(np.argmax(bad))
        raise ValueError(
            f"output: step {step} reuses the output: expected no branch computed there, got {compute[step].sum()}"
        )
    return output


def check_output_weights(weights: Any, output: np.ndarray, order: int) -> np.ndarray:
    weights = check_numbers("output_weights", weights, (len(output), order + 1))
    allowed = output[:, None] & (history(~output, order) >= 0)
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
        raise ValueError(f"{name}: expected finite numbers, got {weights[tuple(where)]} at {_place(where[:-1])}")
    return weights


def check_weights(
    weights: Any, compute: np.ndarray, output: np.ndarray, groups: Sequence[Group], order: int
) -> np.ndarray:
    weights = check_numbers("weights", weights, (*compute.shape, order + 1))
    _check_reused("weights", weights, compute, output, groups)
    if (bad := (weights != 0) & (history(compute, order) < 0)).any():
        where = np.argwhere(bad)[0]
        raise ValueError(
            f"weights: value {where[-1]} (0 = newest) does not exist yet at {_place(where[:-1])}: "
            f"expected 0, got {weights[tuple(where)]}"
        )
    return weights


def check_carry(carry: Any, compute: np.ndarray, output: np.ndarray, groups: Sequence[Group], level: str) -> np.ndarray:
    carry = np.asarray(carry)
    if not np.issubdtype(carry.dtype, np.floating) or carry.shape != compute.shape:
        raise ValueError(f"carry: expected floats {list(compute.shape)}, got {carry.dtype} {list(carry.shape)}")
    carry = carry.astype(np.float64) + 0.0
    if not (finite := np.abs(carry) <= np.finfo(np.float32).max).all():
        raise ValueError(f"carry: expected finite numbers, got {carry[~finite][0]}")
    if (bad := (carry != 0) & ~may_carry(compute, groups, level)).any():
        what = "of a branch" if trunk_beside(groups) else f"at level {level}"
        raise ValueError(f"carry: expected 0 {what}, got {carry[bad][0]:g}")
    _check_reused("carry", carry[..., None], compute, output, groups)
    return carry


def may_carry(compute: np.ndarray, groups: Sequence[Group], level: str) -> np.ndarray:
    """Entries that may have a carry, bool shaped as `compute`: streams, not branches or outputs."""
    allowed = np.full(compute.shape, level == "blocks")
    if trunk_beside(groups):
        allowed[:, -1] = True
    return allowed


def check_channels(
    channels: Any, compute: np.ndarray, output: np.ndarray, groups: Sequence[Group], order: int, level: str
) -> np.ndarray:
    carries = may_carry(compute, groups, level)
    channels = _check_floats("channels", channels, (*compute.shape, order + 1 + bool(carries.any())))
    _check_reused("channels", channels.any(-1), compute, output, groups)
    if channels[~carries][:, order + 1 :].any():
        raise ValueError(f"channels: expected 0 for the carry of a branch (value {order + 1}), got other numbers")
    if (bad := channels[..., : order + 1, :].any(-1) & (history(compute, order) < 0)).any():
        where = np.argwhere(bad)[0]
        raise ValueError(
            f"channels: value {where[-1]} (0 = newest) does not exist yet at {_place(where[:-1])}: expected 0"
        )
    return channels


def check_output_channels(channels: Any, output: np.ndarray, order: int) -> np.ndarray:
    channels = _check_floats("output_channels", channels, (len(output), order + 1))
    allowed = output[:, None] & (history(~output, order) >= 0)
    if (bad := channels.any(-1) & ~allowed).any():
        step, value = np.argwhere(bad)[0]
        raise ValueError(
            f"output_channels: expected 0 at step {step}, value {value} (not reused there, or not existing yet)"
        )
    return channels


def _check_floats(name: str, channels: Any, shape: tuple[int, ...]) -> np.ndarray:
    channels = np.asarray(channels)
    if not np.issubdtype(channels.dtype, np.floating):
        raise TypeError(f"{name}: expected a float dtype, got {channels.dtype}")
    if channels.shape[:-1] != shape or not channels.shape[-1:] or not channels.shape[-1]:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{expected}, channels], got {list(channels.shape)}")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name
        channels = channels.astype(np.float32) + np.float32(0)
    if not np.isfinite(channels).all():
        raise ValueError(f"{name}: expected finite numbers, got {channels[~np.isfinite(channels)][0]}")
    return channels


def _check_reused(
    name: str, numbers: np.ndarray, compute: np.ndarray, output: np.ndarray, groups: Sequence[Group]
) -> None:
    """0 where nothing is reused; `numbers` are [..., any]."""
    if (bad := (numbers != 0) & left_alone(compute, output, groups)[..., None]).any():
        where = np.argwhere(bad)[0]
        whole = "output" if output[where[0]] else "trunk"
        raise ValueError(
            f"{name}: expected 0 where the {whole} is reused, got {numbers[tuple(where)]} at {_place(where[:-1])}"
        )
    if (bad := (numbers != 0) & compute[..., None]).any():
        where = np.argwhere(bad)[0]
        raise ValueError(
            f"{name}: expected 0 where a branch is computed, got {numbers[tuple(where)]} at {_place(where[:-1])}"
        )


def _axes(compute: np.ndarray) -> tuple[str, ...]:
    return ("layer", "branch") if compute.ndim == 3 else ("entry",)


def _place(where: np.ndarray) -> str:
    names = {1: ("step",), 2: ("step", "entry")}.get(len(where), ("step", "layer", "branch"))
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
