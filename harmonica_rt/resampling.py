"""A schedule for other runs: of another number of steps, or entered late."""

from __future__ import annotations

from typing import Any

import numpy as np

from .checks import may_carry, positive
from .decisions import S
from .forecast import history, unlearned, unlearned_carry
from .layout import left_alone


def between(schedule: S, steps: int, fields: dict[str, Any]) -> S:
    """`Schedule.between`.

    Weights are not taken along: on dit-fashion learned ones cost the 2x schedule 4 to 22 dB at other numbers of steps,
    and gave the 2.9x one 0 to 3 dB (bench/schedules/README.md). Nor are the carries and the order beside them.
    """
    steps, was = positive("steps", steps), schedule.steps
    if steps == was:
        return schedule.replace(**fields) if fields else schedule
    output = ~respaced(~schedule.output, steps, _scaled((~schedule.output).sum(), was, steps))
    computed, carries, alone = (v.reshape(was, -1) for v in (schedule.compute, schedule.carry, schedule.left_alone))
    compute = np.zeros((steps, computed.shape[1]), dtype=bool)
    carry = np.zeros(compute.shape)
    for entry in reversed(range(computed.shape[1])):  # the trunk is the last: it says at which steps branches run
        column, before = computed[:, entry], ~alone[:, entry]
        now = ~left_alone(compute, output, schedule.groups)[:, entry]
        count = min(_scaled(column.sum(), was, steps), int(now.sum()))
        compute[now, entry] = respaced(column[before], int(now.sum()), count)
        new, old = np.flatnonzero(now & ~compute[:, entry]), np.flatnonzero(before & ~column)
        if len(new) and len(old):
            nearest = np.abs(new[:, None] / steps - old / was).argmin(1)
            carry[new, entry] = carries[old[nearest], entry]
    own: dict[str, Any] = {}
    if schedule.learned:
        own["order"] = fields.get("order", min(1, schedule.order))
        guidance = fields.get("guidance_scale", schedule.guidance_scale)
        reused = ~compute & ~left_alone(compute, output, schedule.groups)
        reused &= may_carry(compute, schedule.groups, schedule.level)
        carry = np.where(reused, unlearned_carry(schedule.groups, own["order"], guidance), 0.0)
    shape = (steps, *schedule.compute.shape[1:])
    note = f"carried from {was} steps, not learned"
    kept = {
        "compute": compute.reshape(shape),
        "output": output,
        "carry": carry.reshape(shape),
        "timesteps": None,
        "log_snr": None,
        "note": f"{schedule.note}, {note}" if schedule.note else note,
    }
    return schedule.replace(**kept | own | fields)


def _scaled(count: int, was: int, steps: int) -> int:
    return max(1, int(np.floor(count * steps / was + 0.5)))


def respaced(computed: np.ndarray, steps: int, count: int) -> np.ndarray:
    """`count` of `steps` steps, spread over the run as those of `computed` are over its own; step 0 among them.

    Args:
        computed: bool [T], step 0 of them.

    Returns:
        bool [steps].
    """
    nodes = np.append(np.flatnonzero(computed), len(computed))
    numbers = np.arange(count)
    at = np.interp(numbers * ((len(nodes) - 1) / count), np.arange(len(nodes)), nodes) * (steps / len(computed))
    return apart(at, steps)


def falling(computed: np.ndarray) -> np.ndarray:
    """As many steps from the first on, the gaps between them in falling order: bool [T]."""
    gaps = np.sort(np.diff([*np.flatnonzero(computed), len(computed)]))[::-1]
    out = np.zeros(len(computed), dtype=bool)
    out[np.cumsum([0, *gaps[:-1]])] = True
    return out


def apart(at: np.ndarray, steps: int) -> np.ndarray:
    """The steps nearest to `at`, rising, none of them twice: bool [steps]."""
    numbers = np.arange(len(at))
    nearest = np.floor(at + 0.5).astype(int)
    nearest = np.maximum.accumulate(nearest - numbers) + numbers
    out = np.zeros(steps, dtype=bool)
    out[np.minimum(nearest, steps - len(at) + numbers)] = True
    return out


def starting_at(schedule: S, step: int) -> S:
    """`Schedule.starting_at`."""
    if not isinstance(step, (int, np.integer)) or isinstance(step, bool) or not 0 <= step < schedule.steps:
        raise ValueError(f"starting_at: expected a step from 0 to {schedule.steps - 1}, got {step!r}")
    if step == 0:
        return schedule
    compute, output = schedule.compute[step:].copy(), schedule.output[step:].copy()
    compute[0], output[0] = True, False
    timesteps = None if schedule.timesteps is None else schedule.timesteps[step:]
    snr = None if schedule.log_snr is None else schedule.log_snr[step:]
    positions = schedule.positions
    left = None if positions is None else positions[step:]
    weights, output_weights = unlearned(compute, output, schedule.groups, schedule.order, left)
    kept: list[np.ndarray] = []
    for new, old, was, now in (
        (weights, schedule.weights, schedule.compute, compute),
        (output_weights, schedule.output_weights, ~schedule.output, ~output),
    ):
        before, after = (history(c, schedule.order) for c in (was, now))
        same = ((old[step:] == 0) | (after >= 0) & (after == before[step:] - step)).all(-1) & ~now
        new[same] = old[step:][same]
        kept.append(same)
    return schedule.replace(
        compute=compute,
        weights=weights,
        carry=np.where(compute, 0.0, schedule.carry[step:]),
        channels=_where(kept[0], schedule.channels, step),
        output=output,
        output_weights=output_weights,
        output_channels=_where(kept[1], schedule.output_channels, step),
        timesteps=timesteps,
        log_snr=snr,
    )


def _where(kept: np.ndarray, channels: np.ndarray | None, step: int) -> np.ndarray | None:
    """`channels` from `step` on, 0 but where `kept`."""
    return None if channels is None else np.where(kept[..., None, None], channels[step:], np.float32(0))
