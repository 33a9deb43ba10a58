"""Theoretical speed-up, from an adapter's counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decisions import Decisions
from .layout import TRUNK, split_evenly
from .models import adapt

if TYPE_CHECKING:
    from torch import nn


def speedup(
    schedule: Decisions, model: nn.Module, height: int | None, width: int | None, batch: int, context: int | None
) -> float:
    """`Schedule.speedup`."""
    adapter = adapt(model)  # a model without one has its MACs counted as it runs, in report()
    macs = adapter.macs(height, width, batch, context)
    entries = adapter.by_entry(macs.branches)
    fixed = macs.fixed - adapter.layers * macs.around
    blocks, start = {}, 0  # MACs of each block of each list
    for group in adapter.groups:
        own = entries[start : start + group.entries].reshape(group.layers, -1)
        blocks[group.name] = own.sum(axis=1) + macs.around
        start += group.entries
    trunk = np.concatenate(list(blocks.values()))
    run = int((~schedule.output).sum())
    if schedule.level == "branches":
        adapter.check_schedule(schedule)
        computed = schedule.compute.reshape(schedule.steps, -1).sum(axis=0)[: len(entries)] @ entries
        computed += (run - int(schedule.trunk.sum())) * adapter.layers * macs.around
    elif schedule.level == "blocks":
        parts = []
        for group in schedule.groups:
            listed = trunk if group.name == TRUNK else blocks[group.name]
            parts += [listed[part.start : part.stop].sum() for part in split_evenly(len(listed), group.layers)]
        computed = float((schedule.compute.reshape(schedule.steps, -1) @ np.array(parts)).sum())
    else:
        computed = run * trunk.sum()
    return float(schedule.steps * (fixed + trunk.sum()) / (run * fixed + computed))
