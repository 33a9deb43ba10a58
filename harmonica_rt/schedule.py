"""The schedule: for every step and entry of a denoiser, compute or reuse. Static, immutable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure
    from torch import nn


def _frozen(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)  # over bytes: setflags cannot unfreeze it


class Schedule:
    """Which entries a sampler computes at which step, and what stands in for those it reuses.

    Args:
        compute: bool, True where the entry is computed: [T, L, B] of one group, [T, entries] of several, group after
            group, a layer's branches side by side. Step 0 (pure noise) must compute everything. May be left out at
            level output, where there are no entries.
        model: class name of the model it was made for, e.g. ``"DiTTransformer2DModel"``.
        branches: names of the B branches of a layer, in the order they run: short for one group of that many layers in
            ``transformer_blocks``.
        level: what an entry is: ``"branches"``, a residual function of a block; ``"blocks"``, the stream after a group
            of consecutive blocks; ``"output"``, the model's output, which `output` decides about.
        groups: (name, layers, branches) each, e.g. ``("transformer_blocks", 19, ("attn", "mlp"))``; at level blocks
            ``("trunk", 1, ("blocks",))`` or, for a list split into 8, ``("transformer_blocks", 8, ("blocks",))``. At
            level branches ``("trunk", 1, ("blocks",))`` may stand behind the others: the stream after the last branch
            is an entry too. It is computed where the branches run, computed or reused; a step that reuses it leaves
            them alone.
        order: number of cached values a reused entry may stand on, minus one: 0, 1 or 2.
        weights: reuse weights, float, shaped as `compute` with [order + 1] behind, newest value first; 0 where computed
            and for values that do not exist yet. The forecast's unless given.
        carry: of groups of blocks and the trunk, float shaped as `compute`: if reused they are
            sum a_k h_k + carry (x - sum w_k x_k), with x and h the stream before and after them, a their weights, w the
            forecast's. 0 keeps the stream, 1 the residual. 0 where computed, and everywhere unless given.
        channels: weights per channel, float32, shaped as `compute` with [order + 1, width] behind, where there may be
            carries [order + 2, width], the carry's last: what each channel's weight is more than `weights` and `carry`
            say. 0 where these must be 0. None unless given.
        output: bool [T], True for steps that run nothing of the model and return a weighted sum of its last computed
            outputs. None of their entries is computed. No step unless given.
        output_weights: float [T, order + 1], newest output first; 0 for other steps. The forecast's unless given.
        output_channels: float32 [T, order + 1, channels of the output], likewise for `output_weights`.
        sampler: class name of the scheduler it was made for.
        timesteps: the T timesteps of that sampler in the order they run, e.g. ``scheduler.timesteps``. A pipeline tells
            them by itself; a model in a loop of your own is faster, and checked, if the schedule has them.
        log_snr: the T log-SNRs there, as `harmonica_rt.forecast.log_snr` tells them.
        forecast: what the forecast extrapolates over, ``"index"`` of the step, ``"timestep"`` or ``"logsnr"``.
        guidance_scale: classifier-free guidance it was made for.
        note: how it was made.

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
            groups = [
                (
                    "transformer_blocks",
                    np.shape(compute)[1] or 1 if np.ndim(compute) > 1 else 1,
                    check_branches(branches),
                )
            ]
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
        values = {
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

    # ---- builders

    @classmethod
    def full(cls, model: nn.Module, steps: int, **fields: Any) -> Schedule:
        """Everything computed at every step. `fields` are further arguments of `uniform`."""
        return cls.uniform(model, steps, every=1, **fields)

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        steps: int,
        every: int | None = None,
        order: int = 1,
        *,
        computed: int | None = None,
        level: str = "auto",
        groups: int = 1,
        trunk: bool = False,
        carry: float | None = None,
        **fields: Any,
    ) -> Schedule:
        """Everything computed at steps 0, `every`, 2 `every`, ..., everything reused between (FORA; order 1 forecasts).

        Args:
            model: the diffusers model (only its class, lists of blocks and branches are read).
            steps: number of denoiser calls of the sampler, T.
            every: 2 unless given.
            computed: in place of `every`: how many steps are computed, spread over all. Steps that reuse the output or
                the trunk's stream cost next to nothing, so 10 can carry a sampler of 60 (`bench/MORE_STEPS.md`).
            level: ``"branches"`` for models with an adapter, ``"blocks"`` for those with lists of blocks, ``"output"``
                for any; ``"auto"`` is the first of these that the model can have, branches for DiT and PixArt alone and
                not where `computed` is given.
            groups: at level blocks, how many groups each list of blocks is split into; 1 is one group for all lists.
            trunk: at level branches, the trunk is an entry beside them, and it is what the steps between reuse.
            carry: of the reused trunk or groups. Unless given 1 for several groups, and for the trunk 0, or 0.5 where
                `guidance_scale` is at least 3 and the order not 0 (`bench/README.md`, which level for whom).
            fields: further arguments of the constructor (sampler, timesteps, note, ...).
        """
        from .builders import uniform

        return uniform(model, steps, every, computed, order, level, groups, trunk, carry, fields)

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
        from .router_files import from_router

        return from_router(path, model, method, tau, fields)

    @classmethod
    def from_mask(
        cls, mask: Any, model: nn.Module, level: str = "blocks", order: int = 0, carry: float = 1.0, **fields: Any
    ) -> Schedule:
        """All of `model` computed at the steps where `mask`, text or numbers, is 1, reused at those where it is 0."""
        from .imports import from_mask

        return from_mask(mask, model, level, order, carry, fields)

    @classmethod
    def from_ecad(cls, path: str | os.PathLike[str], model: nn.Module, **fields: Any) -> Schedule:
        """Read a schedule of ECAD's: of PixArt the branches, of Flux the blocks, computed if a component of one is."""
        from .imports import from_ecad

        return from_ecad(path, model, fields)

    @classmethod
    def from_smoothcache(cls, path: str | os.PathLike[str], model: nn.Module, **fields: Any) -> Schedule:
        """Read a schedule of SmoothCache's, at level branches; what it does not list is computed."""
        from .imports import from_smoothcache

        return from_smoothcache(path, model, fields)

    def replace(self, **changes: Any) -> Schedule:
        """A changed copy, validated. Learned weights are kept only if what is computed and `order` stay."""
        known = {name: getattr(self, name) for name in self.__slots__}
        if unknown := sorted(set(changes) - {*known, "branches"}):
            raise TypeError(f"replace: unknown field {unknown[0]!r}, expected one of {sorted([*known, 'branches'])}")
        if "branches" in changes:
            known["groups"] = None
        elif "groups" not in changes and len(self.groups) == 1 and np.ndim(changes.get("compute")) == 3:
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
        return Schedule(known.pop("compute"), **known)

    def _carry_for(self, fields: dict[str, Any]) -> np.ndarray | None:
        """The carry of what other fields still reuse, if they are of the same shape."""
        compute, output, groups = *(np.asarray(fields[name]) for name in ("compute", "output")), fields["groups"]
        if compute.shape != self.compute.shape or output.shape != self.output.shape or compute.dtype != bool:
            return None
        return np.where(compute | left_alone(compute, output.astype(bool), groups or ()), 0.0, self.carry)

    def starting_at(self, step: int) -> Schedule:
        """What is left of the plan for a run that enters at `step` with nothing cached yet (image to image).

        Its step 0 computes everything. Entries whose cached values are the same keep their weights; the others, whose
        history has changed, take the forecast's.
        """
        if not isinstance(step, (int, np.integer)) or isinstance(step, bool) or not 0 <= step < self.steps:
            raise ValueError(f"starting_at: expected a step from 0 to {self.steps - 1}, got {step!r}")
        from .resampling import starting_at

        return starting_at(self, step) if step else self

    def between(self, steps: int, **fields: Any) -> Schedule:
        """This plan for a run of `steps` steps: every entry computed as often, at the same places of the run.

        Weights are the forecast's, timesteps gone, unless given: `fields` are as in `replace`. Carries come along, but
        a learned schedule's, which fit its weights: it has those of `uniform` then, and order 1 at most.
        """
        from .resampling import between

        return between(self, steps, fields)

    def beside_branches(self, model: nn.Module) -> Schedule:
        """This plan of one group at level blocks, the same reuse, for a model that can have level branches.

        The trunk is an entry beside its branches then, so that computed steps run as that level does: fused, 1.4 times
        as fast on pixart-emoji.

        Raises:
            ValueError, UnsupportedModelError: it is of another level or model, or `model` cannot have that level.
        """
        from .builders import beside_branches

        return beside_branches(self, model)

    def with_compute(self, compute: np.ndarray) -> Schedule:
        """The same plan computing other entries, shaped as `compute`; none at steps that reuse the output.

        Weights are carried over: they stay where the values they stand on are the same, and elsewhere are the new
        forecast's, changed as they were from the old one's.
        """
        from .resampling import with_compute

        return with_compute(self, compute)

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

    def speedup(
        self,
        model: nn.Module,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        context: int | None = None,
    ) -> float:
        """Theoretical speed-up: MACs of the full run / MACs with this schedule, everything the forward does counted.

        Args:
            model: the diffusers model the schedule is for.
            height, width: size of the model's input; its ``config.sample_size`` unless given.
            batch: samples a call; every MAC of a transformer is per sample, so the ratio does not depend on it.
            context: tokens of a prompt, for a model that reads text; PixArt-alpha's 120 unless given.
        """
        from .theory import speedup

        return speedup(self, model, height, width, batch, context)

    # ---- files and pictures

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file a person can read and diff: one row of 0/1 text per step.

        Weights per channel need the name of a ``.safetensors`` file; that text is its metadata.
        """
        from .schedule_files import write

        write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a file written by `save`. Never runs code; raises ValueError naming what is wrong with the file."""
        from .schedule_files import read

        return read(path)

    def push_to_hub(
        self, repo: str, filename: str | None = None, revision: str | None = None, token: str | bool | None = None
    ) -> str:
        """Commit what `save` writes to a repository of the Hub, made if need be, and its figures to the card there."""
        from .hub import push

        return push(self, repo, filename, revision, token)

    @classmethod
    def from_hub(cls, repo: str, file: str, revision: str | None = None, token: str | bool | None = None) -> Schedule:
        """`load` of a file in a repository of the Hub. FileNotFoundError says what of these is not there."""
        from .hub import pull

        return pull(repo, file, revision, token)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Heatmap, steps by layers, one panel a branch; written to `path` if given. Needs matplotlib."""
        from .plotting import plot_schedule

        return plot_schedule(self, path)

    # ---- value semantics

    def _key(self) -> tuple[Any, ...]:
        arrays = (self.compute.shape, self.compute.tobytes(), self.weights.tobytes(), self.carry.tobytes())
        arrays += (self.output.tobytes(), self.output_weights.tobytes())
        for channels in (self.channels, self.output_channels):
            arrays += (None,) if channels is None else (channels.shape, channels.tobytes())
        rest = (self.order, self.model, self.level, self.groups, self.sampler, self.timesteps)
        rest += (self.log_snr, self.forecast, self.guidance_scale, self.note)
        return arrays + rest

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, ({name: getattr(self, name) for name in self.__slots__},)

    def __repr__(self) -> str:
        from .schedule_text import headline

        return f"<Schedule {headline(self)}>"

    def __str__(self) -> str:
        from .schedule_text import page

        return page(self)


def _rebuild(fields: dict[str, Any]) -> Schedule:
    return Schedule(fields.pop("compute"), **fields)


def where(kept: np.ndarray, channels: np.ndarray | None, step: int) -> np.ndarray | None:
    """`channels` from `step` on, 0 but where `kept`."""
    return None if channels is None else np.where(kept[..., None, None], channels[step:], np.float32(0))
