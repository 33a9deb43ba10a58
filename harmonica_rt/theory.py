"""Theoretical speed-up, from an adapter's counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .layout import split_evenly
from .models import adapt

if TYPE_CHECKING:
    from torch import nn

    from .schedule import Schedule


def speedup(
    schedule: Schedule, model: nn.Module, height: int | None, width: int | None, batch: int, context: int | None
) -> float:
    """`Schedule.speedup`."""
    adapter = adapt(model)  # a model without one has its MACs counted as it runs, in report()
    macs = adapter.macs(height, width, batch, context)
    block = sum(macs.branches) + macs.around
    fixed = macs.fixed - adapter.layers * macs.around
    run = int((~schedule.output).sum())
    if schedule.level == "branches":
        adapter.check_schedule(schedule)
        computed = schedule.compute.sum(axis=(0, 1)) @ np.array(macs.branches, dtype=np.float64)
        computed += run * adapter.layers * macs.around
    elif schedule.level == "blocks":
        parts = [len(part) for part in split_evenly(adapter.layers, schedule.groups[0].layers)]
        computed = block * float((schedule.compute.reshape(schedule.steps, -1) @ np.array(parts)).sum())
    else:
        computed = run * adapter.layers * block
    return float(schedule.steps * (fixed + adapter.layers * block) / (run * fixed + computed))
