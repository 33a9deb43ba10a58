"""What a step costs in time, so that a budget can be one of time: measured on the compiled runtime."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

import harmonica_rt
from harmonica_rt.schedule import Schedule

from .budget import Costs
from .task import Task

ROUNDS = 15


@torch.no_grad()
def seconds(task: Task, batch: int = 4, backend: str = "auto", rounds: int = ROUNDS) -> Costs:
    """Seconds of a step, as medians: one that reuses everything is `fixed`, a computed entry adds its branch's.

    Args:
        batch: images a call; twice as many samples with guidance.
        backend: as in `harmonica_rt.compile`.
    """
    adapter = task.adapter
    kinds = len(adapter.branches)
    # Two full steps to fill the slots, then: all computed; all but one branch's; none. Order 1, as many terms as that
    rows = np.ones((kinds + 4, adapter.layers, kinds), dtype=bool)
    for branch in range(kinds):
        rows[3 + branch, :, branch] = False
    rows[-1] = False
    timesteps = torch.linspace(900, 100, len(rows)).long()
    schedule = Schedule(
        rows, model=adapter.model_class, branches=adapter.branches, order=1, timesteps=timesteps
    )  # which are told, so that modulation is computed at step 0 for all
    model = harmonica_rt.compile(task.model, schedule, backend=backend)
    start = task.draw(batch, 0)
    sample = torch.cat([start.noise, start.noise]) if task.guided else start.noise
    arguments = adapter.arguments(task.conditioning(start))
    taken: list[list[float]] = [[] for _ in rows]
    for _ in range(rounds + 1):  # the first compiles
        model.reset()
        for step, t in enumerate(timesteps):
            _wait(sample)
            began = time.perf_counter()
            model(sample, timestep=t.expand(len(sample)), **arguments)
            _wait(sample)
            taken[step].append(time.perf_counter() - began)
    everything, *without, nothing = (statistics.median(row[1:]) for row in taken[2:])
    branches = [max(0.0, everything - less) / adapter.layers for less in without]
    return Costs(adapter.by_entry(branches), nothing)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
