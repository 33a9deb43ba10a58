"""What stands in for each branch during training: fresh and cached outputs, mixed by gates.

    o = r f + (1 - r) c        f fresh, c the weighted sum of the branch's last values (METHOD: SDT, equation of step 2)

A gate of 1 is a computed branch, one of 0 a reused one; between them both are run.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from harmonica_rt.forecast import forecast

from .denoiser import Evaluate


class Mixing:
    """The cache of one run, and the stand-ins that read and fill it.

    Args:
        entries: L B.
        order: a cached value is extrapolated from the last `order + 1` values.
        steps: T.
    """

    def __init__(self, entries: int, order: int, steps: int) -> None:
        self.order = order
        self.kept = np.zeros((steps, entries, 1), dtype=bool)  # where the cache took a value
        self.values: list[tuple[Tensor, ...]] = [()] * entries  # newest first
        self.evaluated = 0

    def fork(self) -> Mixing:
        other = copy.copy(self)
        other.kept, other.values = self.kept.copy(), list(self.values)
        return other

    def compute(self, step: int) -> MixedStep:
        """Every branch is evaluated, and kept."""
        entries = len(self.values)
        return MixedStep(self, step, None, np.ones(entries, dtype=bool))

    def mix(self, step: int, gates: Tensor, kept: np.ndarray) -> MixedStep:
        """Mix by `gates` [entries]; the cache takes the mixed value where `kept` [entries]."""
        return MixedStep(self, step, gates, kept)


class MixedStep:
    """The stand-in of one step."""

    def __init__(self, mixing: Mixing, step: int, gates: Tensor | None, kept: np.ndarray) -> None:
        self.mixing, self.kept = mixing, kept
        before = mixing.kept[: step + 1]
        self.weights = forecast(before, mixing.order)[step, :, 0].tolist()
        mixing.kept[step, :, 0] = kept
        self.gates = torch.ones(len(kept)) if gates is None else gates
        # Gates that need no gradient and are 0 or 1 leave nothing to mix
        self.known = None if self.gates.requires_grad else self.gates.tolist()

    def __call__(self, entry: int, evaluate: Evaluate) -> Tensor:
        known = self.known[entry] if self.known is not None else None
        if known == 1.0:
            value = self._evaluate(evaluate)
        elif known == 0.0:
            value = self._cached(entry)
        else:
            value = torch.lerp(self._cached(entry), self._evaluate(evaluate), self.gates[entry])
        if self.kept[entry]:
            values = self.mixing.values
            values[entry] = (value.detach(), *values[entry])[: self.mixing.order + 1]
        return value

    def _evaluate(self, evaluate: Evaluate) -> Tensor:
        self.mixing.evaluated += 1
        return evaluate()

    def _cached(self, entry: int) -> Tensor:
        values, weights = self.mixing.values[entry], self.weights[entry]
        total = values[0] if weights[0] == 1.0 else weights[0] * values[0]
        for weight, value in zip(weights[1:], values[1:]):
            total = torch.add(total, value, alpha=weight)
        return total
