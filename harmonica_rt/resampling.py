"""A schedule carried to another number of steps, by where in the run each of its steps is."""

from __future__ import annotations

from typing import Any

import numpy as np

from .checks import positive
from .schedule import Schedule


def between(schedule: Schedule, steps: int, fields: dict[str, Any]) -> Schedule:
    """`Schedule.between`.

    Weights are not taken along: on the reference models learned ones are worth less than the forecast's at any other
    number of steps than the one they were learned at.
    """
    steps, was = positive("steps", steps), schedule.steps
    if steps == was:
        return schedule.replace(**fields) if fields else schedule
    output = ~respaced(~schedule.output, steps, _scaled((~schedule.output).sum(), was, steps))
    running = int((~output).sum())
    computed, carries = (values.reshape(was, -1) for values in (schedule.compute, schedule.carry))
    compute = np.zeros((steps, computed.shape[1]), dtype=bool)
    carry = np.zeros(compute.shape)
    for entry, column in enumerate(computed.T):
        count = min(_scaled(column.sum(), was, steps), running)
        compute[~output, entry] = respaced(column[~schedule.output], running, count)
        new, old = (np.flatnonzero(~c & ~o) for c, o in ((compute[:, entry], output), (column, schedule.output)))
        if len(new) and len(old):
            nearest = np.abs(new[:, None] / steps - old / was).argmin(1)
            carry[new, entry] = carries[old[nearest], entry]
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
    return schedule.replace(**kept | fields)


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
    at = np.floor(at + 0.5).astype(int)
    at = np.maximum.accumulate(at - numbers) + numbers  # no step twice
    out = np.zeros(steps, dtype=bool)
    out[np.minimum(at, steps - count + numbers)] = True
    return out
