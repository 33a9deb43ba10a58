"""What a schedule decides, checked and immutable: its fields, what follows from them, and when two are the same.

`Schedule` adds how they are made, changed, written and drawn. What does that for it stands on this alone. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, TypeVar

import numpy as np

from .checks import (
    check_carry,
    check_channels,
    check_compute,
    check_output,
    check_output_channels,
    check_output_weights,
    check_positions,
    check_timesteps,
    check_weights,
    finite,
)
from .forecast import ORDERS, unlearned
from .layout import Group, check_branches, check_groups, left_alone, panels, trunk_beside

S = TypeVar("S", bound="Decisions")  # what makes or changes a `Schedule` does not import it


def _frozen(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)  # over bytes: setflags cannot unfreeze it


class Decisions:
    """For every step and entry of a denoiser, compute or reuse, and what stands in for what is reused.

    Arguments and fields are those of `Schedule`, which says what they are.

    Raises:
        TypeError, ValueError: naming what was expected and what came.
    """

    __slots__ = (
        "carry",
        "channels",
        "compute",
        "forecast",
        "groups",
        "guidance_scale",
        "level",
        "log_snr",
        "model",
        "note",
        "order",
        "output",
        "output_channels",
        "output_weights",
        "sampler",
        "timesteps",
        "weights",
    )

    compute: np.ndarray
    weights: np.ndarray
    carry: np.ndarray
    channels: np.ndarray | None
    output: np.ndarray
    output_weights: np.ndarray
    output_channels: np.ndarray | None
    order: int
    model: str
    level: str
    groups: tuple[Group, ...]
    sampler: str | None
    timesteps: tuple[float, ...] | None
    log_snr: tuple[float, ...] | None
    forecast: str
    guidance_scale: float | None
    note: str

    def __init__(
        self,
        compute: np.ndarray | None = None,
        *,
        model: str,
        branches: Sequence[str] | None = None,
        level: str = "branches",
        groups: Sequence[tuple[str, int, Sequence[str]]] | None = None,
        order: int = 1,
        weights: np.ndarray | None = None,
        carry: np.ndarray | None = None,
        channels: np.ndarray | None = None,
        output: np.ndarray | None = None,
        output_weights: np.ndarray | None = None,
        output_channels: np.ndarray | None = None,
        sampler: str | None = None,
        timesteps: Sequence[float] | None = None,
        log_snr: Sequence[float] | None = None,
        forecast: str = "index",
        guidance_scale: float | None = None,
        note: str = "",
    ) -> None:
        for name, value in [("model", model), ("note", note), ("sampler", "" if sampler is None else sampler)]:
            if not isinstance(value, str):
                raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
        if groups is None and level != "output":
            shape = () if compute is None else np.shape(compute)
            groups = [("transformer_blocks", shape[1] or 1 if len(shape) > 1 else 1, check_branches(branches))]
        elif branches is not None:
            raise TypeError(f"branches: expected none beside groups or at level output, got {branches!r}")
        if not isinstance(order, (int, np.integer)) or isinstance(order, bool) or order not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
        if compute is None and level == "output" and output is not None:
            compute = np.zeros((len(output), 0), dtype=bool)
        level, groups = check_groups(level, () if groups is None else groups)
        compute = check_compute(compute, groups)
        output = np.zeros(len(compute), dtype=bool) if output is None else check_output(output, compute)
        if timesteps is not None:
            timesteps = check_timesteps(timesteps, len(compute))
        if log_snr is not None:
            log_snr = check_timesteps(log_snr, len(compute), "log_snr")
        positions = check_positions(forecast, timesteps, log_snr)
        default, output_default = unlearned(compute, output, groups, order, positions)
        weights = default if weights is None else check_weights(weights, compute, output, groups, order)
        carry = np.zeros(compute.shape) if carry is None else check_carry(carry, compute, output, groups, level)
        if output_weights is None:
            output_weights = output_default
        else:
            output_weights = check_output_weights(output_weights, output, order)
        if channels is not None:
            channels = check_channels(channels, compute, output, groups, order, level)
        if output_channels is not None:
            output_channels = check_output_channels(output_channels, output, order)
        if guidance_scale is not None:
            guidance_scale = finite("guidance_scale", guidance_scale)
        values: dict[str, Any] = {
            "compute": _frozen(compute),
            "weights": _frozen(weights),
            "carry": _frozen(carry),
            "channels": None if channels is None else _frozen(channels),
            "output": _frozen(output),
            "output_weights": _frozen(output_weights),
            "output_channels": None if output_channels is None else _frozen(output_channels),
            "order": int(order),
            "model": model,
            "level": level,
            "groups": groups,
            "sampler": sampler,
            "timesteps": timesteps,
            "log_snr": log_snr,
            "forecast": forecast,
            "guidance_scale": guidance_scale,
            "note": note,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Schedule is immutable: use schedule.replace({name}=...) for a changed copy")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("Schedule is immutable")

    def replace(self, **changes: Any) -> Self:
        """A changed copy, validated. Learned weights are kept only if what is computed and `order` stay.

        Args:
            changes: fields by name; None for weights and carries takes the forecast's and 0.

        Raises:
            TypeError, ValueError: there is no such field, or its value does not fit the others.
        """
        known = {name: getattr(self, name) for name in Decisions.__slots__}
        if unknown := sorted(set(changes) - {*known, "branches"}):
            raise TypeError(f"replace: unknown field {unknown[0]!r}, expected one of {sorted([*known, 'branches'])}")
        if "branches" in changes:
            known["groups"] = None
        elif "groups" not in changes and len(self.groups) == 1 and np.ndim(changes.get("compute", ())) == 3:
            known["groups"] = (self.groups[0]._replace(layers=np.shape(changes["compute"])[1]),)
        for name in ("weights", "output_weights"):
            if name not in changes and ({"compute", "output", "order", "forecast"} & set(changes) or not self.learned):
                known[name] = None
        for name in ("channels", "output_channels"):
            if name not in changes and {"compute", "output", "order"} & set(changes):
                known[name] = None
        if "carry" not in changes and {"compute", "output"} & set(changes):
            known["carry"] = self._carry_for(known | changes)
        if "output" not in changes and np.shape(changes.get("compute", self.compute))[:1] != (self.steps,):
            known["output"] = None
        for name in ("timesteps", "log_snr"):
            if name not in changes and np.shape(changes.get("compute", self.compute))[:1] != (self.steps,):
                known[name] = None
        known.update(changes)
        return type(self)(known.pop("compute"), **known)

    def _carry_for(self, fields: dict[str, Any]) -> np.ndarray | None:
        """The carry of what other fields still reuse, if they are of the same shape."""
        compute, output, groups = *(np.asarray(fields[name]) for name in ("compute", "output")), fields["groups"]
        if compute.shape != self.compute.shape or output.shape != self.output.shape or compute.dtype != bool:
            return None
        return np.where(compute | left_alone(compute, output.astype(bool), groups or ()), 0.0, self.carry)

    # ---- statistics

    @property
    def steps(self) -> int:
        """T, the number of denoiser calls."""
        return self.compute.shape[0]

    @property
    def layers(self) -> int:
        """L, of all groups together."""
        return sum(group.layers for group in self.groups)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches of all groups, each once."""
        return tuple(dict.fromkeys(branch for group in self.groups for branch in group.branches))

    def __getitem__(self, name: str) -> np.ndarray:
        """What is computed of group `name`: bool [T, layers, branches], a view."""
        start = 0
        for group in self.groups:
            if group.name == name:
                flat = self.compute.reshape(self.steps, -1)[:, start : start + group.entries]
                return flat.reshape(self.steps, group.layers, len(group.branches))
            start += group.entries
        raise KeyError(f"{name!r}: expected one of {tuple(group.name for group in self.groups)}")

    @property
    def trunk(self) -> np.ndarray:
        """Steps that reuse the trunk beside branches, bool [T]."""
        return ~self.compute[:, -1] & ~self.output if trunk_beside(self.groups) else np.zeros(self.steps, dtype=bool)

    @property
    def left_alone(self) -> np.ndarray:
        """Entries that a step neither computes nor reuses, since it reuses the output or the trunk; as `compute`."""
        return left_alone(self.compute, self.output, self.groups)

    @property
    def cur(self) -> float:
        """Cache utilisation ratio: reused entries / all entries of all steps, from 0 to 1; outputs at level output."""
        return float(1.0 - self.compute.mean() if self.groups else self.output.mean())

    @property
    def cur_by_branch(self) -> dict[str, float]:
        """Cache utilisation ratio of each branch of each group, from 0 to 1."""
        flat = self.compute.reshape(self.steps, -1)
        return {panel.title: float(1.0 - flat[:, panel.entries].mean()) for panel in panels(self.groups)}

    @property
    def learned(self) -> bool:
        """Whether the weights differ from the forecast's, or are per channel."""
        if self.channels is not None or self.output_channels is not None:
            return True
        branches, outputs = unlearned(self.compute, self.output, self.groups, self.order, self.positions)
        return not (np.array_equal(self.weights, branches) and np.array_equal(self.output_weights, outputs))

    @property
    def positions(self) -> np.ndarray | None:
        """Where each step is for the forecast, float [T]; None for its number."""
        return check_positions(self.forecast, self.timesteps, self.log_snr)

    # ---- value semantics

    def _key(self) -> tuple[Any, ...]:
        values = (getattr(self, name) for name in Decisions.__slots__)
        return tuple((v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Decisions) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), {name: getattr(self, name) for name in Decisions.__slots__})


def _rebuild(kind: type[Decisions], fields: dict[str, Any]) -> Decisions:
    return kind(fields.pop("compute"), **fields)
