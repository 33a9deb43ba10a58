"""Budgets: what a schedule costs, steering beta towards a target, and hard schedules that meet it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from harmonica_rt.models import Adapter
from harmonica_rt.schedule import Schedule

from .router import Router

TOLERANCE = 0.02  # relative, of the speed-up or CUR that was asked for


@dataclass(frozen=True)
class Costs:
    """What a step costs: `fixed`, and `entries` [L B] for those it computes. MACs, or seconds."""

    entries: np.ndarray
    fixed: float


def macs(adapter: Adapter, context: int | None = None) -> Costs:
    """MACs of a step; a reused entry has none. `context` as in `Adapter.macs`."""
    counted = adapter.macs(None, None, 1, context)
    return Costs(adapter.by_entry(counted.branches), float(counted.fixed))


class Budget:
    """A target speed-up, theoretical, or a target CUR.

    Args:
        pinned: steps that compute everything.
        costs: MACs unless given.

    Raises:
        ValueError: no schedule of so many steps meets it; the message says what can be had.
    """

    def __init__(
        self,
        adapter: Adapter,
        steps: int,
        speedup: float | None = None,
        cur: float | None = None,
        pinned: tuple[int, ...] = (0,),
        costs: Costs | None = None,
    ) -> None:
        if speedup is not None and cur is None:
            name, self.target = "speed-up", speedup
        elif cur is not None and speedup is None:
            name, self.target = "CUR", cur
        else:
            raise ValueError(f"expected a target speed-up or a target CUR, got {speedup} and {cur}")
        self.adapter, self.steps, self.cur = adapter, steps, cur
        costs = macs(adapter) if costs is None else costs
        self.costs, self.fixed = costs.entries, costs.fixed
        least = np.zeros((steps, len(self.costs)), dtype=bool)
        least[list(pinned)] = True
        low, high = self.value(np.ones_like(least)), self.value(least)
        if not low <= self.target <= high:
            raise ValueError(f"target {name}: expected {low:.2f} to {high:.2f} for {steps} steps, got {self.target:g}")

    def value(self, compute: np.ndarray) -> float:
        """Speed-up or CUR, whichever the target is, of bool or gates [T, L B]."""
        if self.cur is not None:
            return float(1.0 - compute.mean())
        full = self.steps * (self.fixed + self.costs.sum())
        return float(full / (self.steps * self.fixed + (compute @ self.costs).sum()))

    def miss(self, compute: np.ndarray) -> float:
        """Relative distance above (positive) or below the target."""
        return self.value(compute) / self.target - 1 if self.target > 0 else self.value(compute)

    def met(self, compute: np.ndarray) -> bool:
        """Within the tolerance, or as close as whole entries allow."""
        if self.cur is not None:
            entry = 1 / (compute.size * max(self.target, 1e-9))
        else:
            entry = self.costs.max() * self.value(compute) / (self.steps * (self.fixed + self.costs.sum()))
        return abs(self.miss(compute)) <= max(TOLERANCE, entry)

    def tau(self, router: Router) -> float:
        """The threshold of r at which the router's hard schedule meets the target most closely."""
        logits = router.to_tensor().double().flatten(1).numpy()
        logits[list(router.pinned)] = np.inf
        learned = np.unique(logits[np.isfinite(logits)])
        edges = np.concatenate([learned[:1] - 1, (learned[1:] + learned[:-1]) / 2, learned[-1:] + 1])
        low, high = 0, len(edges) - 1  # the value rises with the threshold
        while low < high:
            middle = (low + high) // 2
            if self.value(logits > edges[middle]) < self.target:
                low = middle + 1
            else:
                high = middle
        edge = min(edges[max(low - 1, 0) : low + 1], key=lambda e: abs(self.miss(logits > e)))
        return float(1 / (1 + math.exp(-edge)))


class Beta:
    """The weight of the cost, constant or steered so that gates approach a budget."""

    RATE, AHEAD = 0.15, 12  # largest change of log(beta) an iteration; iterations the controller looks ahead

    def __init__(self, value: float | None, budget: Budget | None) -> None:
        self.value, self.budget = value, budget
        self.miss: float | None = None

    def start(self, error: float, entries: int) -> None:
        """With a budget and no beta yet: one at which the cost of all entries weighs as much as the error."""
        if self.value is None:
            self.value = max(error, 1e-12) / entries

    def steer(self, gates: np.ndarray) -> None:
        """Raise beta where the gates [T, L B] compute too much, lower it where too little."""
        if self.budget is None:
            return
        assert self.value is not None, "start() comes first"
        miss = math.log(max(self.budget.value(gates), 1e-9) / self.budget.target) if self.budget.target else 0.0
        # Logits integrate beta and beta integrates the miss: without its trend, the two would swing for ever
        expected = miss + self.AHEAD * (miss - (miss if self.miss is None else self.miss))
        self.miss = miss
        self.value *= math.exp(-self.RATE * max(-1.0, min(1.0, 5 * expected)))


def describe(schedule: Schedule, budget: Budget | None) -> str:
    if budget is None:
        return f"CUR {100 * schedule.cur:.1f} %"
    compute = schedule.compute.reshape(schedule.steps, -1)
    name = "speed-up" if budget.cur is None else "CUR"
    return f"{name} {budget.value(compute):.3f} (target {budget.target:g})"
