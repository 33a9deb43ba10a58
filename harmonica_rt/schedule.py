"""The schedule: for every step, layer and branch of a diffusion transformer, compute or reuse. Static, immutable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure
    from torch import nn

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


def _frozen(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)  # over bytes: setflags cannot unfreeze it


class Schedule:
    """Which branches a sampler computes at which step, and what stands in for those it reuses.

    Args:
        compute: bool [T, L, B], True where the branch is computed. Step 0 (pure noise) must compute everything.
        model: class name of the model it was made for, e.g. ``"DiTTransformer2DModel"``.
        branches: names of the B branches of a layer, in the order they run.
        order: number of cached values a reused branch may stand on, minus one: 0, 1 or 2.
        weights: reuse weights, float [T, L, B, order + 1], newest value first; 0 where computed and for values that
            do not exist yet. The forecast's unless given.
        sampler: class name of the scheduler it was made for.
        timesteps: the T timesteps of that sampler in the order they run, e.g. ``scheduler.timesteps``. A pipeline tells
            them by itself; a model in a loop of your own is faster, and checked, if the schedule has them.
        guidance_scale: classifier-free guidance it was made for.
        note: how it was made.

    Raises:
        TypeError, ValueError: naming what was expected and what came.
    """

    __slots__ = (
        "branches",
        "compute",
        "guidance_scale",
        "model",
        "note",
        "order",
        "sampler",
        "timesteps",
        "weights",
    )

    compute: np.ndarray
    weights: np.ndarray
    order: int
    model: str
    branches: tuple[str, ...]
    sampler: str | None
    timesteps: tuple[float, ...] | None
    guidance_scale: float | None
    note: str

    def __init__(
        self,
        compute: np.ndarray,
        *,
        model: str,
        branches: Sequence[str],
        order: int = 1,
        weights: np.ndarray | None = None,
        sampler: str | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        note: str = "",
    ) -> None:
        for name, value in [("model", model), ("note", note), ("sampler", "" if sampler is None else sampler)]:
            if not isinstance(value, str):
                raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
        named = isinstance(branches, Sequence) and not isinstance(branches, str)
        if not named or not branches or not all(isinstance(b, str) and b for b in branches):
            raise TypeError(f"branches: expected a sequence of names, got {branches!r}")
        if len(set(branches)) != len(branches):
            raise ValueError(f"branches: expected distinct names, got {tuple(branches)}")
        if not isinstance(order, (int, np.integer)) or isinstance(order, bool) or order not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
        compute = _check_compute(compute, len(branches))
        unlearned = forecast(compute, order)
        weights = unlearned if weights is None else _check_weights(weights, compute, order)
        if timesteps is not None:
            timesteps = _check_timesteps(timesteps, len(compute))
        if guidance_scale is not None:
            guidance_scale = _finite("guidance_scale", guidance_scale)
        values = {
            "compute": _frozen(compute),
            "weights": _frozen(weights),
            "order": int(order),
            "model": model,
            "branches": tuple(branches),
            "sampler": sampler,
            "timesteps": timesteps,
            "guidance_scale": guidance_scale,
            "note": note,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Schedule is immutable: use schedule.replace({name}=...) for a changed copy")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("Schedule is immutable")

    # ---- builders

    @classmethod
    def full(cls, model: nn.Module, steps: int, **fields: Any) -> Schedule:
        """Every branch computed at every step. `fields` are further arguments of the constructor."""
        return cls.uniform(model, steps, every=1, **fields)

    @classmethod
    def uniform(cls, model: nn.Module, steps: int, every: int = 2, order: int = 1, **fields: Any) -> Schedule:
        """Everything computed at steps 0, `every`, 2 `every`, ..., everything reused between (FORA; order 1 forecasts).

        Args:
            model: the diffusers model (only its class, layers and branches are read).
            steps: number of denoiser calls of the sampler, T.
            fields: further arguments of the constructor (sampler, timesteps, note, ...).
        """
        from .models import adapt

        steps, every = _positive("steps", steps), _positive("every", every)
        adapter = adapt(model)
        compute = np.zeros((steps, adapter.layers, len(adapter.branches)), dtype=bool)
        compute[::every] = True
        fields.setdefault("note", f"uniform, every {every}" if every > 1 else "full")
        return cls(compute, model=adapter.model_class, branches=adapter.branches, order=order, **fields)

    @classmethod
    def from_router(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        method: str = "harmonica",
        tau: float = 0.1,
        **fields: Any,
    ) -> Schedule:
        """Read a published router checkpoint without running what it pickles.

        An entry is computed iff sigmoid(logit) > `tau`. ``"l2c"``: of the papers' step numbers k = T-1-i only the even
        ones may reuse, the others compute whatever their logits say. Step 0 always computes.

        Args:
            path: a torch file holding ``{"routers": {"<k>.prob": [layers * branches] logits, ...}, ...}``.
            model: the diffusers model whose layers and branches it must match.
            method: ``"harmonica"`` or ``"l2c"``.
        """
        from .models import adapt
        from .schedule_files import read_router

        if method not in ("harmonica", "l2c"):
            raise ValueError(f"method: expected 'harmonica' or 'l2c', got {method!r}")
        tau = _finite("tau", tau)
        adapter = adapt(model)
        logits = read_router(path)
        entries = adapter.layers * len(adapter.branches)
        if logits.shape[1] != entries:
            raise ValueError(
                f"{path}: the router has {logits.shape[1]} logits a step, but {adapter.model_class} has "
                f"{adapter.layers} layers x {len(adapter.branches)} branches = {entries}"
            )
        with np.errstate(over="ignore"):  # a logit far below 0 is a sigmoid of 0
            compute = 1.0 / (1.0 + np.exp(-logits)) > tau
        if method == "l2c":
            compute[len(compute) - 1 - np.arange(len(compute)) & 1 == 1] = True
        compute[0] = True
        compute = compute.reshape(-1, adapter.layers, len(adapter.branches))
        fields.setdefault("note", f"{method} router, tau {tau:g}")
        fields.setdefault("order", 0)
        return cls(compute, model=adapter.model_class, branches=adapter.branches, **fields)

    def replace(self, **changes: Any) -> Schedule:
        """A changed copy, validated. Learned weights are kept only if neither `compute` nor `order` changes."""
        known = {name: getattr(self, name) for name in self.__slots__}
        if unknown := sorted(set(changes) - set(known)):
            raise TypeError(f"replace: unknown field {unknown[0]!r}, expected one of {sorted(known)}")
        if "weights" not in changes and ({"compute", "order"} & set(changes) or not self.learned):
            known["weights"] = None
        if "timesteps" not in changes and np.shape(changes.get("compute", self.compute))[:1] != (self.steps,):
            known["timesteps"] = None
        known.update(changes)
        return Schedule(known.pop("compute"), **known)

    def starting_at(self, step: int) -> Schedule:
        """What is left of the plan for a run that enters at `step` with nothing cached yet (image to image).

        Its step 0 computes everything. Entries whose cached values are the same keep their weights; the others, whose
        history has changed, take the forecast's.
        """
        if not isinstance(step, (int, np.integer)) or isinstance(step, bool) or not 0 <= step < self.steps:
            raise ValueError(f"starting_at: expected a step from 0 to {self.steps - 1}, got {step!r}")
        if step == 0:
            return self
        compute = self.compute[step:].copy()
        compute[0] = True
        weights = forecast(compute, self.order)
        before, now = history(self.compute, self.order)[step:] - step, history(compute, self.order)
        same = ((self.weights[step:] == 0) | (now >= 0) & (now == before)).all(-1) & ~compute
        weights[same] = self.weights[step:][same]
        timesteps = None if self.timesteps is None else self.timesteps[step:]
        return self.replace(compute=compute, weights=weights, timesteps=timesteps)

    # ---- statistics

    @property
    def steps(self) -> int:
        """T, the number of denoiser calls."""
        return self.compute.shape[0]

    @property
    def layers(self) -> int:
        return self.compute.shape[1]

    @property
    def cur(self) -> float:
        """Cache utilisation ratio: reused entries / (T L B), from 0 to 1."""
        return float(1.0 - self.compute.mean())

    @property
    def cur_by_branch(self) -> dict[str, float]:
        """Cache utilisation ratio of each branch name, from 0 to 1."""
        return {name: float(1.0 - self.compute[..., b].mean()) for b, name in enumerate(self.branches)}

    @property
    def learned(self) -> bool:
        """Whether the weights differ from the forecast's."""
        return not np.array_equal(self.weights, forecast(self.compute, self.order))

    def speedup(self, model: nn.Module, height: int | None = None, width: int | None = None, batch: int = 1) -> float:
        """Theoretical speed-up: MACs of the full run / MACs with this schedule, everything the forward does counted.

        Args:
            model: the diffusers model the schedule is for.
            height, width: size of the model's input; its ``config.sample_size`` unless given.
            batch: samples a call; every MAC of a transformer is per sample, so the ratio does not depend on it.
        """
        from .models import adapt

        adapter = adapt(model)
        adapter.check_schedule(self)
        macs = adapter.macs(height, width, batch)
        full = macs.fixed + self.layers * sum(macs.branches)
        computed = self.compute.sum(axis=(0, 1)) @ np.array(macs.branches, dtype=np.float64)
        return float(self.steps * full / (self.steps * macs.fixed + computed))

    # ---- files and pictures

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file a person can read and diff: one row of 0/1 text per step."""
        from .schedule_files import write_json

        write_json(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a file written by `save`. Never runs code; raises ValueError naming what is wrong with the file."""
        from .schedule_files import read_json

        return read_json(path)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Heatmap, steps by layers, one panel a branch; written to `path` if given. Needs matplotlib."""
        from .plotting import plot_schedule

        return plot_schedule(self, path)

    # ---- value semantics

    def _key(self) -> tuple[Any, ...]:
        arrays = (self.compute.shape, self.compute.tobytes(), self.weights.tobytes())
        rest = (self.order, self.model, self.branches, self.sampler, self.timesteps, self.guidance_scale, self.note)
        return arrays + rest

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, ({name: getattr(self, name) for name in self.__slots__},)

    def __repr__(self) -> str:
        shape = f"{self.steps} steps x {self.layers} layers x {'/'.join(self.branches)}"
        kind = "learned weights" if self.learned else "forecast" if self.order else "plain reuse"
        reuse = "all computed" if self.cur == 0 else f"order {self.order} ({kind}), CUR {100 * self.cur:.1f} %"
        return f"<Schedule {self.model}: {shape}, {reuse}>"

    def __str__(self) -> str:
        head = [repr(self).strip("<>")]
        head.append("CUR by branch: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in self.cur_by_branch.items()))
        made = [self.sampler, None if self.guidance_scale is None else f"guidance {self.guidance_scale:g}", self.note]
        if any(made):
            head.append(", ".join(part for part in made if part))
        widths = [max(self.layers, len(name)) for name in self.branches]
        head.append("step  " + "  ".join(n.ljust(w) for n, w in zip(self.branches, widths)) + "  (# compute, . reuse)")
        for i, step in enumerate(np.where(self.compute, "#", ".")):
            head.append(f"{i:4}  " + "  ".join("".join(row).ljust(w) for row, w in zip(step.T, widths)).rstrip())
        return "\n".join(head)


def _rebuild(fields: dict[str, Any]) -> Schedule:
    return Schedule(fields.pop("compute"), **fields)


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return int(value)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def _check_compute(compute: Any, branches: int) -> np.ndarray:
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


def _check_weights(weights: Any, compute: np.ndarray, order: int) -> np.ndarray:
    weights = np.asarray(weights)
    if not np.issubdtype(weights.dtype, np.floating):
        raise TypeError(f"weights: expected a float dtype, got {weights.dtype}")
    expected = (*compute.shape, order + 1)
    if weights.shape != expected:
        raise ValueError(f"weights: expected shape {list(expected)} for order {order}, got {list(weights.shape)}")
    weights = weights.astype(np.float64) + 0.0
    if not (finite := np.abs(weights) <= np.finfo(np.float32).max).all():
        where = np.argwhere(~finite)[0]
        raise ValueError(f"weights: expected finite numbers, got {weights[tuple(where)]} at {_place(where)}")
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
    return f"step {where[0]}, layer {where[1]}, branch {where[2]}"


def _check_timesteps(timesteps: Any, steps: int) -> tuple[float, ...]:
    if hasattr(timesteps, "tolist"):  # a scheduler's are a tensor
        timesteps = timesteps.tolist()
    try:
        values = tuple(timesteps)
    except TypeError:
        raise TypeError(f"timesteps: expected a sequence of numbers, got {type(timesteps).__name__}") from None
    values = tuple(_finite("timesteps", t) for t in values)
    if len(values) != steps:
        raise ValueError(f"timesteps: expected {steps} (one a step), got {len(values)}")
    return values
