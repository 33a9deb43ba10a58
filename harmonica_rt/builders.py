"""Schedules that compute whole steps by a rule: every so many, or so many of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import finite, may_carry, positive
from .decisions import S
from .forecast import unlearned_carry
from .layout import WHOLE, shape_of_entries
from .models import layout_of, own_model
from .models.blocks import block_lists
from .resampling import apart, falling

if TYPE_CHECKING:
    from torch import nn

CLOSER = 0.93  # power of the spread; below 1 it is closer towards the end


def uniform(
    kind: type[S],
    model: nn.Module,
    steps: int,
    every: int | None,
    computed: int | None,
    order: int,
    level: str,
    groups: int,
    trunk: bool,
    carry: float | None,
    fields: dict[str, Any],
) -> S:
    """`Schedule.uniform` of class `kind`."""
    at, note = _computed(positive("steps", steps), every, computed)
    if level == "auto" and computed is not None and block_lists(own_model(model)):
        level = "blocks"  # as near as branches, and reused steps cost less
    layout = layout_of(model, level, positive("groups", groups))
    if trunk:
        if layout.level != "branches":
            raise ValueError(
                f"trunk: expected False at level {layout.level}, got True: level='branches' has a trunk beside its "
                "branches, level='blocks' with groups=1 is the trunk alone"
            )
        layout = layout._replace(groups=(*layout.groups, WHOLE))
    compute = np.zeros((steps, *shape_of_entries(layout.groups)), dtype=bool)
    compute[at] = True
    if layout.level == "output":
        fields["output"] = ~at
    if layout.level == "blocks" or trunk:
        if carry is None:
            carry = unlearned_carry(layout.groups, order, fields.get("guidance_scale"))
        carries = may_carry(compute, layout.groups, layout.level) & ~compute
        fields["carry"] = np.where(carries, finite("carry", carry), 0.0)
    elif carry is not None:
        raise ValueError(f"carry: expected none at level {layout.level}, got {carry!r}")
    fields.setdefault("note", note)
    return kind(compute, order=order, **layout._asdict(), **fields)


def _computed(steps: int, every: int | None, computed: int | None) -> tuple[np.ndarray, str]:
    """Which of `steps` are computed, bool [T], and how that is called."""
    if computed is None:
        every = positive("every", 2 if every is None else every)
        return np.arange(steps) % every == 0, f"uniform, every {every}" if every > 1 else "full"
    if every is not None:
        raise ValueError(f"every: expected none beside computed, {computed!r}, got {every!r}")
    if positive("computed", computed) > steps:
        raise ValueError(f"computed: expected at most {steps}, as many as there are steps, got {computed}")
    return spread(steps, computed), f"uniform, {computed} of {steps}" if computed < steps else "full"


def spread(steps: int, computed: int) -> np.ndarray:
    """Which of `steps` are computed where so many of them are: bool [T].

    Nearly even; a little closer towards the end, gaps in falling order, and the last run of reused steps is half as
    long as others: there the log-SNR changes fastest, and nothing mends what goes wrong (bench/MORE_STEPS.md).
    """
    return falling(apart(steps * (np.arange(computed) / (computed - 0.5)) ** CLOSER, steps))


def beside_branches(schedule: S, model: nn.Module) -> S:
    """`Schedule.beside_branches`."""
    trunk = (WHOLE,) if schedule.level == "blocks" else ()
    if schedule.level == "branches" or schedule.groups != trunk:
        raise ValueError(
            "beside_branches: expected a schedule at level output, or blocks with one group, got level "
            f"{schedule.level} with {len(schedule.groups)} groups"
        )
    layout = layout_of(model, "branches")
    if layout.model != schedule.model:
        raise ValueError(f"beside_branches: expected a model of {schedule.model}, got {layout.model}")
    groups = (*layout.groups, *trunk)
    shape = shape_of_entries(groups)

    def widened(values: np.ndarray) -> np.ndarray:
        """Those of the trunk, its entry being the last; others' are 0."""
        own = values.reshape(schedule.steps, 1, *values.shape[3:])
        return np.concatenate([np.zeros((len(own), shape[0] - 1, *own.shape[2:]), own.dtype), own], axis=1)

    names = ("sampler", "timesteps", "guidance_scale", "log_snr", "forecast", "output", "note")
    compute = np.zeros((schedule.steps, *shape), dtype=bool)
    compute[schedule.compute.all(tuple(range(1, schedule.compute.ndim))) & ~schedule.output] = True
    given = {name: getattr(schedule, name) for name in names}
    made = type(schedule)(compute, order=schedule.order, **{**layout._asdict(), "groups": groups}, **given)
    own = {"output_weights": schedule.output_weights, "output_channels": schedule.output_channels}
    if trunk:
        own |= {"weights": widened(schedule.weights), "carry": widened(schedule.carry)}
        own |= {"channels": None if schedule.channels is None else widened(schedule.channels)}
    return made.replace(**own)
